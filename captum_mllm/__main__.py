"""``python -m captum_mllm`` is ``captum-mllm``."""

import sys

from captum_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
