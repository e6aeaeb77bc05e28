"""The error tree of respcache, and what to do about each error.

RespcacheError
├── ConfigurationError          raised at start-up: fix the code or the environment, do not catch
├── Denied                      raised by a resolver: the request bypasses the cache
├── UndeclaredWrite             raised before the statement runs: declare its tables or tenant
├── UndeclaredRead              raised only with strict_reads: declare the table
├── AckBarrierOverflow          a response outgrew the buffer while its transaction was open:
│                               commit earlier
├── InvalidationPending         ``settled()`` timed out: the write is safe, its invalidation is
│                               retried
├── OutboxError                 the database failed a relay cycle: caught inside the library,
│   │                           never reaches a request
│   └── OutboxMissing           the database has no outbox (any more)
├── OperationError              an operator's action was not carried out (``ops/admin.py``): show
│   │                           the message; nothing was changed
│   ├── AccessRefused           the operator's role or tenant does not allow it
│   ├── NotFound                it does not exist, or is another tenant's: indistinguishable
│   ├── InvalidOperation        the message names the value and the fix
│   └── AuditLogUnavailable     the audit log could not be written
└── StoreError                  any failure of the cache server: caught inside the library, never
    │                           reaches a request
    ├── StoreUnavailable        no usable connection, or the deadline passed
    └── StoreReplyError         the server replied with an error
"""


class RespcacheError(Exception):
    """Base of every error that respcache raises."""


class ConfigurationError(RespcacheError):
    """The configuration is wrong. The message names the value and the fix."""


class Denied(RespcacheError):
    """The caller is unknown, or may not see the resource. Raised by resolvers."""


class UndeclaredWrite(RespcacheError):
    """A statement that changes data was refused, because its tables or its tenant cannot be
    determined."""


class UndeclaredRead(RespcacheError):
    """A cached read selected from a table that its policy does not declare."""


class AckBarrierOverflow(RespcacheError):
    """The response outgrew the buffer that defers it until its transaction has ended."""


class InvalidationPending(RespcacheError):
    """Not every invalidation was confirmed in time. They are still being retried."""


class OutboxError(RespcacheError):
    """The outbox could not be read or changed. Nothing is served from the cache until it can."""


class OutboxMissing(OutboxError):
    """The database has no outbox: the migration that creates it has not run, or one has dropped
    it."""


class OperationError(RespcacheError):
    """An operator's action was not carried out. The message is for the operator."""


class AccessRefused(OperationError):
    """The operator's access is insufficient: its role is too low, or it covers one tenant and the
    action concerns all."""


class NotFound(OperationError):
    """The tenant, module or key does not exist, or belongs to another tenant."""


class InvalidOperation(OperationError):
    """The request is invalid. The message names the value and the fix."""


class AuditLogUnavailable(OperationError):
    """The audit log could not be written, so the action was not carried out."""


class StoreError(RespcacheError):
    """The cache server failed. The request continues without it."""


class StoreUnavailable(StoreError):
    """There is no usable connection to the cache server, or its deadline passed."""


class StoreReplyError(StoreError):
    """The cache server replied to a command with an error."""
