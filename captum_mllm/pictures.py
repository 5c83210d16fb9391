"""The user's pictures: opened as an image viewer shows them, with 8 bits, within a limit."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_HEADER = threading.Lock()  # Pillow's limit is one for the process
_DEEP = ("I", "F")  # first letters of Pillow's modes of more than 8 bits
_NAME = 200  # characters of a file's name that are shown


# ---- files --------------------------------------------------------------------------------------


def open_picture(path: Path, max_pixels: int | None = None) -> "Image":
    """Open a picture as RGB, rotated by its EXIF orientation, with transparent parts on white.

    Of several frames (an animation, or pages) the first is taken; more than 8 bits per channel
    become 8 by the rule of :func:`to_eight_bits`.

    Args:
        path: the file.
        max_pixels: the most pixels (height times width) that a picture may have; default Pillow's
            limit, ``PIL.Image.MAX_IMAGE_PIXELS`` (89,478,485).

    Returns:
        An RGB picture.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture that Pillow can read, a damaged one, or one of more pixels; the
            message names the file.

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
    return read_picture(path, max_pixels)[0]


def read_picture(path: Path, max_pixels: int | None = None) -> tuple["Image", list[str]]:
    """As :func:`open_picture`, with sentences on what was left out or changed.

    Args:
        path: the file.
        max_pixels: see :func:`open_picture`.

    Returns:
        An RGB picture; a sentence each for several frames and for more than 8 bits.

    Raises:
        FileNotFoundError: as :func:`open_picture`.
        ValueError: likewise.
    """
    from PIL import Image, ImageOps

    notes = []
    with decoding(path, max_pixels) as opened:
        if getattr(opened, "is_animated", False) and opened.format != "MPO":  # a photo's preview
            notes.append(f"{shown_name(path)} holds several frames; the first one is taken.")
        if opened.mode.startswith(_DEEP):
            low, high = _value_range(opened.mode, np.asarray(opened))
            notes.append(
                f"{shown_name(path)} has more than 8 bits per pixel (Pillow's mode {opened.mode}); "
                f"scaled to 8, from {low:g} (black) to {high:g} (white)."
            )
        picture = to_eight_bits(ImageOps.exif_transpose(opened)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB"), notes


@contextmanager
def decoding(
    path: Path, max_pixels: int | None = None, *, header_only: bool = False
) -> Iterator["Image"]:
    """Open a picture file; what a damaged one raises, here or on decoding, is a ValueError.

    Args:
        path: the file.
        max_pixels: see :func:`open_picture`; compared with the file's header.
        header_only: whether the pixels are not decoded; default False: the checksums of a PNG are
            compared, which Pillow's decoding does not do: damage would be other pixels.

    Yields:
        Pillow's picture, not decoded yet.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as :func:`open_picture`.
    """
    from PIL import Image, UnidentifiedImageError

    name = repr(shown_name(path))
    if not is_file(path):
        raise FileNotFoundError(f"there is no file {name}; check the path")
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    try:
        with warnings.catch_warnings():
            # The limit is checked here; what Pillow says about odd metadata is no error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            with _header(path, limit) as opened:
                if limit is not None and opened.width * opened.height > limit:
                    raise Image.DecompressionBombError(
                        f"{opened.width} x {opened.height} pixels are more than {limit}"
                    )
                if opened.format == "PNG" and not header_only:
                    with _header(path, limit) as same:
                        same.verify()
                yield opened
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large: {error}; make it smaller, or raise max_pixels if you trust it"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is not a picture that Pillow can read; convert it to PNG or JPEG"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a decoder raises anything on damaged data
        if isinstance(error, OSError) and error.errno is not None:  # of the system
            raise ValueError(f"{name} can't be opened: {error.strerror}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is a broken picture ({reason}); save it again") from error


def header_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture file, from its header: nothing is decoded, no size too large.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a picture that Pillow can read.
    """
    with decoding(path, np.iinfo(np.int64).max, header_only=True) as opened:
        return opened.height, opened.width


def is_file(path: Path) -> bool:
    """Whether a file is there; False for names that no file can have (too long, say).

    Args:
        path: the file.
    """
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def shown_name(path: str | os.PathLike[str]) -> str:
    r"""A file's name as text that every file and terminal can hold.

    Args:
        path: the file.

    Returns:
        The name with what UTF-8 can't hold as escapes, its middle left out beyond 200 characters.

    Example:
        >>> shown_name(os.fsdecode(b"caf\xe9.png"))
        'caf\\udce9.png'
    """
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")
    half = _NAME // 2
    return text if len(text) <= _NAME else f"{text[:half]}...{text[-half:]}"


@contextmanager
def _header(path: Path, limit: int | None) -> Iterator["Image"]:
    """``PIL.Image.open`` with its own limit raised, if ours is higher."""
    from PIL import Image

    with _HEADER:
        before = Image.MAX_IMAGE_PIXELS
        try:
            if limit is None or (before is not None and limit > before):
                Image.MAX_IMAGE_PIXELS = limit
            opened = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with opened:
        yield opened


# ---- depth --------------------------------------------------------------------------------------


def to_eight_bits(picture: Any) -> Any:
    """A picture of more than 8 bits per channel as grey of 8 bits; others as they are.

    Pillow's ``convert("RGB")`` cuts such values off at 255, so that nearly all pixels turn white.
    Here 16 bits (modes ``I;16``, ``I;16B``, ...) are scaled by their whole range, 0..65535. The
    modes ``I`` and ``F`` don't state their range: it is the first of 0..1 (``F`` only), 0..255 and
    0..65535 that holds all values; otherwise the lowest value is black and the highest white.

    Args:
        picture: PIL picture of any mode.

    Returns:
        A PIL picture, of mode ``L`` if it was changed.

    Raises:
        ValueError: NaN or infinite values.

    Example:
        >>> from PIL import Image
        >>> deep = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
        >>> np.asarray(to_eight_bits(deep)).tolist()
        [[0, 1, 128, 255]]
    """
    from PIL import Image

    if not picture.mode.startswith(_DEEP):
        return picture
    values = np.asarray(picture)
    low, high = _value_range(picture.mode, values)
    scale = 255 / (high - low) if high > low else 0.0
    return Image.fromarray(np.rint((values.astype(np.float64) - low) * scale).astype(np.uint8))


def _value_range(mode: str, values: np.ndarray) -> tuple[float, float]:
    """The values that become 0 and 255."""
    if mode.startswith("I;16"):
        return 0.0, 65535.0
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite numbers")
    low, high = float(values.min()), float(values.max())
    for top in (1.0, 255.0, 65535.0)[mode == "I" :]:
        if low >= 0 and high <= top:
            return 0.0, top
    return low, high
