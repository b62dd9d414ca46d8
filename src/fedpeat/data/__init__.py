"""Who owns which text or images, as examples in NumPy arrays."""

from fedpeat.data.documents import Document, FederatedDocuments
from fedpeat.data.examples import Examples, FederatedData
from fedpeat.data.federation import load_federated_text
from fedpeat.data.image_federation import load_federated_images
from fedpeat.data.images import ImageSet
from fedpeat.data.packing import PackedText, pack

__all__ = [
    "Document",
    "Examples",
    "FederatedData",
    "FederatedDocuments",
    "ImageSet",
    "PackedText",
    "load_federated_images",
    "load_federated_text",
    "pack",
]
