"""Score methods on annotated pictures: any model, any method, any metric, in resumable runs.

``run_benchmark(model, processor, data, out, settings)`` explains one answer per picture with every
method, scores the maps and writes each result before the next is computed.
"""

from captum_mllm.benchmark.run import Benchmark, run_benchmark
from captum_mllm.benchmark.settings import METRICS, Settings

__all__ = ["METRICS", "Benchmark", "Settings", "run_benchmark"]
