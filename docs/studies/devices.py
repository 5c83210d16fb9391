"""All families on GPUs against the CPU: `make study NAME=devices`; one line of JSON a family.

Largest differences of MSEA's and MSEA+ARC's maps and text attributions from the CPU's in float32,
over the largest value (two images of other sizes, a video for Qwen); correlation in half precision;
and of a model that accelerate dispatched over all GPUs, the CPU and the disk.
"""

import json
import sys
import warnings
from tempfile import mkdtemp

import accelerate
import torch
import transformers

from captum_mllm import LogitLens
from tests.oracle import families
from tests.oracle.published import ARC, MSEA


def numbers(result):
    return torch.cat([*(m.flatten() for m in result.grid_attr), result.token_attr.flatten()])


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def compare(name):
    subject = families.family(name)
    answer = subject.answer
    pictures = [subject.wide_picture, subject.picture][: 1 if name == "PaliGemma" else 2]
    cases = {"images": subject.encode(*pictures)}
    if name.startswith("Qwen"):
        cases["video"] = families.video(subject)
    row = {}
    for case, inputs in cases.items():
        msea = numbers(MSEA(subject.model).attribute(inputs, answer))
        arc = numbers(ARC(MSEA(subject.model)).attribute(inputs, answer))
        for attn in ("sdpa", "eager"):
            model = families.family(name, attn=attn).model.cuda()
            found = numbers(MSEA(model).attribute(inputs, answer))
            row[f"{case}, {attn}, MSEA"] = difference(found, msea)
            found = numbers(ARC(MSEA(model)).attribute(inputs, answer))
            row[f"{case}, {attn}, ARC"] = difference(found, arc)
        for dtype in (torch.bfloat16, torch.float16):
            model = families.family(name, dtype=dtype).model.cuda()
            found = numbers(MSEA(model).attribute(inputs, answer))
            row[f"{case}, {dtype}, correlation"] = float(
                torch.stack([found, msea]).corrcoef()[0, 1]
            )
    LogitLens(families.family(name).model.cuda()).attribute(cases["images"])  # generates
    row["dispatched, MSEA"] = dispatched(name, cases["images"], answer)
    return row


def dispatched(name, inputs, answer):
    model = families.family(name).model
    expected = numbers(MSEA(model).attribute(inputs, answer))
    third = int(accelerate.utils.compute_module_sizes(model)[""] * 0.35)
    memory = dict.fromkeys([*range(torch.cuda.device_count()), "cpu"], third)
    whole = model._no_split_modules
    places = accelerate.infer_auto_device_map(model, memory, no_split_module_classes=whole)
    model = accelerate.dispatch_model(model, places, offload_dir=mkdtemp())
    inputs = {key: value.cuda() for key, value in inputs.items()}
    try:
        model(**inputs)
    except RuntimeError as error:
        return f"the model itself fails there: {str(error).splitlines()[0]}"
    return difference(numbers(MSEA(model).attribute(inputs, answer)), expected)


def main():
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    print(
        json.dumps(
            {"gpus": gpus, "torch": torch.__version__, "transformers": transformers.__version__}
        )
    )
    for name in families.NAMES:
        print(json.dumps({"family": name} | compare(name)), flush=True)


if __name__ == "__main__":
    main()
