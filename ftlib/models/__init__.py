"""Model families: inputs, adapters, loading, generation. Importing this imports torch and transformers.

Models come from the store: nothing here reaches the hub, whatever a library would like to look up.
"""

import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
