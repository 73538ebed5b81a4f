"""Prompts to embeddings: the protocol and what chooses by name (`encoder.py`), and a file for each encoder.

Nothing here knows networks that read the text, model folders, bundles or devices, and importing it loads no model.

Every encoder returns token embeddings of one fixed length, so that the networks and the exported engines see one
shape whatever the prompt. Each prompt is encoded alone: its embedding does not depend on what it is batched with.
"""

from pylumiere.networks.text.encoder import TextEncoder, encode_ids, load_text_encoder, load_tokenizer
from pylumiere.networks.text.hashing import HashEncoder
from pylumiere.networks.text.minilm import MiniLMEncoder

__all__ = ["HashEncoder", "MiniLMEncoder", "TextEncoder", "encode_ids", "load_text_encoder", "load_tokenizer"]
