"""The command line, ``captum-mllm``."""
