"""The recorded measurements, each made by one command; its output lies in ``records/``.

``python -m captum_mllm.studies.compare`` compares the methods on held-out scenes,
``python -m captum_mllm.studies.seeds`` does so for three training seeds: the noise floor,
``python -m captum_mllm.studies.sets`` shows the base lens on every test set beside its bound,
``python -m captum_mllm.studies.relevance`` shows what ARC changes where context matters, with
rank-biased overlap and with what could replace it,
``python -m captum_mllm.studies.hallucination`` tells real from hallucinated nouns by their maps,
``python -m captum_mllm.studies.windows`` measures scales of models of one size,
``python -m captum_mllm.studies.large`` takes time and memory at the sizes of 7B models on a GPU,
``python -m captum_mllm.studies.readme_picture`` draws the picture at the top of README. The time
of the post-processing is measured beside its slow twin, by ``tests/benchmark_postprocessing.py``.
"""
