"""Who owns which text, as packed tokens in NumPy arrays."""

from fedpeat.data.documents import Document, FederatedDocuments
from fedpeat.data.federation import FederatedText, load_federated_text
from fedpeat.data.packing import PackedText, pack

__all__ = [
    "Document",
    "FederatedDocuments",
    "FederatedText",
    "PackedText",
    "load_federated_text",
    "pack",
]
