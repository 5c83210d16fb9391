"""The one place that imports names which captum does not export at its top level."""

from typing import Any

import captum.log

log_usage: Any = captum.log.log_usage  # NoiseTunnel calls what this decorator wraps
