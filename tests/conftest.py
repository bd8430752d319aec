"""What every test runs under; JAX and Flax read these variables when they are first imported.

Eight virtual CPU devices. Programs run a few times on little data, so that compiling them well and
naming every layer in them would cost more than it saves.
"""

import gc
import os
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
)
os.environ["FLAX_PROFILE"] = "false"

# Tracing makes millions of small objects that live on, which a young collector walks in vain.
gc.set_threshold(100_000, 20, 100)

# Under nohup, or in the background of a script, they are ignored, and commands keep it so.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
