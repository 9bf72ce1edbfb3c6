"""Model families: inputs, adapters, loading, generation. Importing this imports torch and transformers.

Models come from the store: nothing here reaches the hub, whatever a library would like to look up.
"""

import logging
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line per layer and batch, and kernels it could download
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
