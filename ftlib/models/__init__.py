"""Model families: inputs, adapters, loading, generation. Importing this imports torch and transformers."""

from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
