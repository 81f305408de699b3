"""The Open Inference Protocol v2 over REST as bytes: request body -> InferenceRequest, InferenceResult -> reply body.

Pure functions. They know neither HTTP frameworks nor models; what a model takes and gives comes in as a Signature.
"""

from app.api.wire.checks import check_reply_form, validate
from app.api.wire.compression import choose_encoding, compress, decompress, parse_content_encoding, unpack
from app.api.wire.reply import Reply, chosen, encode_response, json_raw_bytes
from app.api.wire.request import OutputChoice, ParsedRequest, parse_header_length, parse_infer
from app.api.wire.tensors import count_non_finite

__all__ = [
    "OutputChoice",
    "ParsedRequest",
    "Reply",
    "check_reply_form",
    "choose_encoding",
    "chosen",
    "compress",
    "count_non_finite",
    "decompress",
    "encode_response",
    "json_raw_bytes",
    "parse_content_encoding",
    "parse_header_length",
    "parse_infer",
    "unpack",
    "validate",
]
