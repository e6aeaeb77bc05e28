"""The error tree of respcache, and who should catch what.

RespcacheError
├── ConfigurationError     wrong set-up, raised at start-up: mend the code or the environment, do
not catch ├── Denied                 raised by a resolver: the caller may not see this; the wrapper
bypasses, the handler answers ├── UndeclaredWrite        raised before a statement runs whose tables
or tenant cannot be told: mend the call ├── UndeclaredRead         a cached read selected from a
table that it does not declare (only with strict_reads) ├── AckBarrierOverflow     a response
outgrew the buffer while its transaction was still open: commit earlier ├── InvalidationPending
``settled()`` gave up waiting: the write is safe, its invalidation is retried ├── OutboxError
the database did not do what a round asked: caught inside the library, never reaches a request │
└── OutboxMissing      it has no outbox (any more) ├── OperationError         what an operator asked
for was not done (``ops/admin.py``): tell them; nothing was changed │   ├── AccessRefused      their
role, or their tenant, may not │   ├── NotFound           there is no such thing, or it is another
tenant's: indistinguishable │   ├── InvalidOperation   what was asked for cannot be: the message
names the value and the fix │   └── AuditLogUnavailable         it could not be written down who did it, so
it was not done └── StoreError             anything the store did wrong: caught inside the library,
never reaches a request
    ├── StoreUnavailable   no usable connection, or the deadline passed
    └── StoreReplyError    the server answered with an error
"""


class RespcacheError(Exception):
    """Base of every error that respcache raises."""


class ConfigurationError(RespcacheError):
    """The set-up is wrong; the message names the value and the fix."""


class Denied(RespcacheError):
    """The caller is unknown or may not see what was asked for. Raised by resolvers."""


class UndeclaredWrite(RespcacheError):
    """A statement that changes data was refused, because its tables or its tenant cannot be told
    from it."""


class UndeclaredRead(RespcacheError):
    """A cached read selected from a table that its policy does not declare."""


class AckBarrierOverflow(RespcacheError):
    """The response outgrew the buffer that holds it back until its transaction has ended."""


class InvalidationPending(RespcacheError):
    """Not every invalidation was confirmed in time; they are still being retried."""


class OutboxError(RespcacheError):
    """The outbox could not be read or changed; nothing is served from the cache until it can."""


class OutboxMissing(OutboxError):
    """There is no outbox in the database: before the migration that creates it, or after the one
    that drops it."""


class OperationError(RespcacheError):
    """What an operator asked for was not done; the message is for them."""


class AccessRefused(OperationError):
    """The access does not allow this: its role is too low, or it is of one tenant and this concerns
    all."""


class NotFound(OperationError):
    """There is no such tenant, module or key, or it is another tenant's."""


class InvalidOperation(OperationError):
    """What was asked for cannot be; the message names the value and the fix."""


class AuditLogUnavailable(OperationError):
    """The trail could not be written, so the act was not done."""


class StoreError(RespcacheError):
    """The store failed; the request goes on without it."""


class StoreUnavailable(StoreError):
    """There is no usable connection to the store, or its deadline passed."""


class StoreReplyError(StoreError):
    """The server answered a command with an error."""
