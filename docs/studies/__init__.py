"""The recorded measurements, each made by one command; its output lies in ``records/``.

They are no part of the package: ``make study NAME=quality`` puts this folder on the path.

``make study NAME=compare`` compares the methods on held-out scenes,
``make study NAME=seeds`` does so for three training seeds: the noise floor,
``make study NAME=sets`` shows the base lens on every test set beside its bound,
``make study NAME=relevance`` shows what ARC changes where context matters, with
rank-biased overlap and with what could replace it,
``make study NAME=hallucination`` tells real from hallucinated nouns by their maps,
``make study NAME=direct`` measures maps that read the context, ``NAME=calibration`` how far their
values should fall, ``NAME=direct_faithful`` whether the model used what they mark,
``NAME=controls`` the order of the controls, ``NAME=gates`` how many samples pass the gates,
``make study NAME=windows`` measures scales of models of one size,
``make study NAME=large`` takes time and memory at the sizes of 7B models on a GPU,
``make study NAME=classes`` tries every image-text-to-text class of transformers on tiny models,
``make study NAME=readme_picture`` draws the picture at the top of README. ``make study
NAME=postprocessing`` times the post-processing, ``NAME=captum`` captum's methods, ``NAME=devices``
compares GPUs with the CPU; these three need the tests' reference implementations beside them.
"""
