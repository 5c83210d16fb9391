"""``python -m captum_mllm`` is ``captum-mllm``."""

import sys

from captum_mllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
