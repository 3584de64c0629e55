"""What holds for every test: no model hub, one thread, no time limits on examples."""

import os
from pathlib import Path

# Before torch and huggingface_hub are imported: both read these once. Commands started by tests inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NO_COLOR"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH")])
)

from hypothesis import HealthCheck, settings

# Machines that test are often busy: an example that takes long is no failure. Where a change is judged (CI), the
# examples are the same each time; elsewhere they are new ones.
settings.register_profile(
    "here",
    deadline=None,
    print_blob=not os.environ.get("CI"),
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("here")
