"""Open a picture as an image viewer shows it."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def open_picture(path: Path) -> "Image":
    """Open a picture as RGB, rotated by its EXIF orientation, with transparent parts on white.

    Args:
        path: the file.

    Returns:
        An RGB picture.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture that Pillow can read, or one of so many pixels that Pillow takes
            it for an attack.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGBA", (2, 1)).save(file, "PNG")
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "clear.png"
        >>> _ = path.write_bytes(file.getvalue())
        >>> open_picture(path).getpixel((0, 0))
        (255, 255, 255)
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{str(path)!r} is too large, make it smaller: {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{str(path)!r} is not a picture that Pillow can read; convert it to PNG or JPEG"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is a broken picture ({error}); save it again") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
