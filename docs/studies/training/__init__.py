"""The programs behind the shipped reference models: building, training and evaluating them.

``make study NAME=training.train ARGS="--family llava --out DIR"`` trains one,
``make study NAME=training.evaluate_model`` prints its figures.
"""
