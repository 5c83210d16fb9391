"""The check of the wheel finds what must not be in it."""

import zipfile

from tests.check_wheel import not_the_product


def test_what_only_measures_is_found(tmp_path):
    files = {
        "captum_mllm/attr/arc.py": "import torch",
        "captum_mllm/reference/models/llava/README.md": "loss.backward()",
        "captum_mllm/studies/quality.py": "",
        "captum_mllm/reference/training/train.py": "",
        "captum_mllm/reference/fit.py": "def fit(model):\n    loss(model).backward()",
        "captum_mllm/cli/study.py": "def run():\n    from studies import quality",
        "studies/records/quality.json": "",
        "captum_mllm-0.1.dist-info/METADATA": "",
    }
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        assert not_the_product(archive) == sorted(list(files)[2:7])
