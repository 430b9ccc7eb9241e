"""Tendon: from a mix of robot datasets to a vision-language-action policy that acts."""

import logging

__version__ = "0.1.0"

for _name in ("torch.utils._pytree", "bitsandbytes"):  # with the extra `quant`, importing transformers makes them warn each time
    logging.getLogger(_name).setLevel(logging.ERROR)
