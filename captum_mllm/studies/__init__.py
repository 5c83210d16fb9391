"""The recorded measurements, each made by one command; its output lies in ``records/``.

``python -m captum_mllm.studies.compare`` compares the methods on held-out scenes,
``python -m captum_mllm.studies.interference`` shows what ARC changes where context interferes.
"""
