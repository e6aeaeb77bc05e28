"""Documents: descriptions of files that are stored elsewhere."""

from crm import caching
from crm.models import RELATED, Document
from crm.module import Module

documents = Module(
    model=Document,
    plural="documents",
    singular="document",
    cached=caching.documents,
    required=("name",),
    choices={"related_type": RELATED},
    filters=("file_type", "related_type", "related_id"),
    searched=(Document.name, Document.description),
    deleted="The file itself is not deleted.",
)
router = documents.router()
documents.add_records(router)
