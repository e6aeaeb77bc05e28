"""The tables of the CRM.

Every business table has a tenant; every list has an index that begins with the tenant.
"""

from datetime import UTC, date, datetime
from typing import Any, ClassVar
from uuid import UUID, uuid4

from sqlalchemy import (
    CheckConstraint,
    Date,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Numeric,
    String,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column

ACCOUNT_TYPES = ("customer", "prospect", "partner", "vendor", "competitor")
HEALTH = ("unknown", "healthy", "at_risk", "churning", "new")
LEAD_STATUS = ("new", "contacted", "qualified", "unqualified", "converted", "lost")
CONTACT_STATUS = ("active", "inactive", "prospect", "customer", "churned")
SOURCE_STATUS = ("active", "Promoted", "Archived")
STAGES = ("prospecting", "qualification", "proposal", "negotiation", "closed_won", "closed_lost")
ACTIVITY_TYPES = ("call", "email", "meeting", "task", "note")
ACTIVITY_STATUS = ("scheduled", "in_progress", "overdue", "completed", "cancelled")
OPEN_ACTIVITY = ("scheduled", "in_progress")
RELATED = ("lead", "contact", "account", "opportunity", "bizdev_source")
TASK_STATUS = ("PENDING", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED")
ROLES = ("employee", "manager", "admin", "superadmin")
VISIBILITY = ("shared", "hierarchical")


def now() -> datetime:
    """Return the current time, in UTC."""
    return datetime.now(UTC)


def as_uuid(key: str | UUID) -> UUID | None:
    """Parse an id; return None if it is not a UUID."""
    try:
        return key if isinstance(key, UUID) else UUID(key)
    except ValueError:
        return None


class Base(DeclarativeBase):
    """The base of all tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        dict[str, Any]: JSONB,
        list[str]: ARRAY(Text),
        datetime: DateTime(timezone=True),
        UUID: Uuid,
    }


class Stamped:
    """The id of a row, and when it was created and last updated."""

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    created_at: Mapped[datetime] = mapped_column(default=now, server_default=text("now()"))
    updated_at: Mapped[datetime] = mapped_column(
        default=now, onupdate=now, server_default=text("now()")
    )


class Tenant(Stamped, Base):
    """A customer of the CRM. ``settings`` holds ``visibility_mode``."""

    __tablename__ = "tenants"
    slug: Mapped[str] = mapped_column(String(63), unique=True)
    name: Mapped[str] = mapped_column(String(200))
    settings: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    status: Mapped[str] = mapped_column(String(20), default="active", server_default="active")


class Team(Stamped, Base):
    """A group of employees; managers of a team also see its child teams."""

    __tablename__ = "teams"
    tenant_id: Mapped[UUID] = mapped_column(
        ForeignKey("tenants.id", ondelete="CASCADE"), index=True
    )
    name: Mapped[str] = mapped_column(String(200))
    parent_team_id: Mapped[UUID | None] = mapped_column(ForeignKey("teams.id", ondelete="SET NULL"))


class Employee(Stamped, Base):
    """A user. Superadmins belong to no tenant."""

    __tablename__ = "employees"
    tenant_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("tenants.id", ondelete="CASCADE"), index=True
    )
    email: Mapped[str] = mapped_column(String(254), unique=True)
    name: Mapped[str] = mapped_column(String(200))
    role: Mapped[str] = mapped_column(String(20), default="employee", server_default="employee")
    team_id: Mapped[UUID | None] = mapped_column(ForeignKey("teams.id", ondelete="SET NULL"))
    password_hash: Mapped[str | None] = mapped_column(String(255))
    status: Mapped[str] = mapped_column(String(20), default="active", server_default="active")


class Owned(Stamped):
    """A business row: it has a tenant, free metadata, and perhaps an employee it is assigned to.

    ``title`` is its name in a sentence. ``kind`` is its name in polymorphic references (None:
    nothing refers to it). ``about`` are the two columns of its own polymorphic reference.
    """

    title: ClassVar[str]
    kind: ClassVar[str | None] = None
    about: ClassVar[tuple[str, str] | None] = None

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    is_test_data: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    metadata_: Mapped[dict[str, Any]] = mapped_column(
        "metadata", default=dict, server_default=text("'{}'")
    )

    @declared_attr
    def assigned_to(cls) -> Mapped[UUID | None]:
        """The employee who is responsible for the row; None: visible to all employees."""
        return mapped_column(ForeignKey("employees.id", ondelete="SET NULL"), index=True)

    @property
    def display_name(self) -> str:
        """The name that the API shows in references to this row."""
        return str(getattr(self, "name", "") or "")


class Person(Owned):
    """The columns that leads and contacts share."""

    first_name: Mapped[str | None] = mapped_column(String(100))
    last_name: Mapped[str | None] = mapped_column(String(100))
    email: Mapped[str | None] = mapped_column(String(254))
    phone: Mapped[str | None] = mapped_column(String(50))
    job_title: Mapped[str | None] = mapped_column(String(200))
    description: Mapped[str | None] = mapped_column(Text)
    address: Mapped[str | None] = mapped_column(String(200))
    city: Mapped[str | None] = mapped_column(String(100))
    state: Mapped[str | None] = mapped_column(String(100))
    zip: Mapped[str | None] = mapped_column(String(20))
    country: Mapped[str | None] = mapped_column(String(100))
    tags: Mapped[list[str]] = mapped_column(default=list, server_default=text("'{}'"))

    @property
    def display_name(self) -> str:
        """First and last name."""
        return " ".join(part for part in (self.first_name, self.last_name) if part)


def list_indexes(table: str, *columns: str) -> tuple[Index, ...]:
    """Return the indexes of a list: one for its order, and one per filter, followed by the order.

    All begin with the tenant.
    """
    newest = (text("created_at DESC"), text("id DESC"))
    return (
        Index(f"ix_{table}_newest", "tenant_id", *newest),
        *(
            Index(f"ix_{table}_by_{column}", "tenant_id", column, *newest)
            for column in (*columns, "assigned_to")
        ),
    )


class Account(Owned, Base):
    """A company. The attributes mirror the table, so there are more than 15."""

    title = "account"
    kind = "account"
    __tablename__ = "accounts"
    __table_args__ = (
        *list_indexes("accounts", "type", "industry"),
        Index("ix_accounts_name", "tenant_id", text("lower(name)")),
        CheckConstraint("score BETWEEN 0 AND 100", name="score"),
    )
    name: Mapped[str] = mapped_column(String(200))
    type: Mapped[str | None] = mapped_column(String(20))
    industry: Mapped[str | None] = mapped_column(String(100))
    website: Mapped[str | None] = mapped_column(String(500))
    phone: Mapped[str | None] = mapped_column(String(50))
    email: Mapped[str | None] = mapped_column(String(254))
    description: Mapped[str | None] = mapped_column(Text)
    annual_revenue: Mapped[float | None] = mapped_column(Numeric(15, 2, asdecimal=False))
    employee_count: Mapped[int | None] = mapped_column(Integer)
    street: Mapped[str | None] = mapped_column(String(200))
    city: Mapped[str | None] = mapped_column(String(100))
    state: Mapped[str | None] = mapped_column(String(100))
    zip: Mapped[str | None] = mapped_column(String(20))
    country: Mapped[str | None] = mapped_column(String(100))
    tags: Mapped[list[str]] = mapped_column(default=list, server_default=text("'{}'"))
    score: Mapped[int | None] = mapped_column(Integer)
    health_status: Mapped[str] = mapped_column(
        String(20), default="unknown", server_default="unknown"
    )
    next_action: Mapped[str | None] = mapped_column(Text)


class Lead(Person, Base):
    """A person who may become a customer."""

    title = "lead"
    kind = "lead"
    __tablename__ = "leads"
    __table_args__ = (
        *list_indexes("leads", "status", "source", "account_id"),
        CheckConstraint("score BETWEEN 0 AND 100", name="score"),
    )
    company: Mapped[str | None] = mapped_column(String(200))
    status: Mapped[str] = mapped_column(String(20), default="new", server_default="new")
    source: Mapped[str | None] = mapped_column(String(100))
    account_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("accounts.id", ondelete="SET NULL"), index=True
    )
    estimated_value: Mapped[float | None] = mapped_column(Numeric(15, 2, asdecimal=False))
    score: Mapped[int] = mapped_column(Integer, default=50, server_default="50")
    do_not_call: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    do_not_text: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    conversion_probability: Mapped[float | None] = mapped_column(Numeric(5, 2, asdecimal=False))
    last_contacted: Mapped[date | None] = mapped_column(Date)


class Contact(Person, Base):
    """A person at a customer or partner."""

    title = "contact"
    kind = "contact"
    __tablename__ = "contacts"
    __table_args__ = (
        *list_indexes("contacts", "status", "account_id"),
        Index("ix_contacts_updated", "tenant_id", text("updated_at DESC"), text("id DESC")),
    )
    mobile: Mapped[str | None] = mapped_column(String(50))
    account_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("accounts.id", ondelete="SET NULL"), index=True
    )
    department: Mapped[str | None] = mapped_column(String(100))
    status: Mapped[str] = mapped_column(String(20), default="active", server_default="active")
    lead_source: Mapped[str | None] = mapped_column(String(100))


class BizDevSource(Owned, Base):
    """A source of new business; promotion turns it into an account.

    The attributes mirror the table, so there are more than 15.
    """

    title = "BizDev source"
    kind = "bizdev_source"
    __tablename__ = "bizdev_sources"
    __table_args__ = (*list_indexes("bizdev_sources", "status", "source_type", "priority"),)
    source_name: Mapped[str] = mapped_column(String(200))
    source_type: Mapped[str | None] = mapped_column(String(100))
    source_url: Mapped[str | None] = mapped_column(String(500))
    contact_person: Mapped[str | None] = mapped_column(String(200))
    contact_email: Mapped[str | None] = mapped_column(String(254))
    contact_phone: Mapped[str | None] = mapped_column(String(50))
    status: Mapped[str] = mapped_column(String(20), default="active", server_default="active")
    priority: Mapped[str] = mapped_column(String(20), default="medium", server_default="medium")
    leads_generated: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    opportunities_created: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    revenue_generated: Mapped[float] = mapped_column(
        Numeric(15, 2, asdecimal=False), default=0, server_default="0"
    )
    company_name: Mapped[str | None] = mapped_column(String(200))
    industry: Mapped[str | None] = mapped_column(String(100))
    website: Mapped[str | None] = mapped_column(String(500))
    phone_number: Mapped[str | None] = mapped_column(String(50))
    city: Mapped[str | None] = mapped_column(String(100))
    state_province: Mapped[str | None] = mapped_column(String(100))
    country: Mapped[str | None] = mapped_column(String(100))
    tags: Mapped[list[str]] = mapped_column(default=list, server_default=text("'{}'"))
    account_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("accounts.id", ondelete="SET NULL"), index=True
    )
    archived_at: Mapped[datetime | None]

    @property
    def display_name(self) -> str:
        """The name of the source."""
        return self.source_name


class Opportunity(Owned, Base):
    """A possible sale."""

    title = "opportunity"
    kind = "opportunity"
    __tablename__ = "opportunities"
    __table_args__ = (
        *list_indexes("opportunities", "stage", "account_id", "contact_id", "lead_id"),
    )
    name: Mapped[str] = mapped_column(String(200))
    stage: Mapped[str] = mapped_column(
        String(20), default="qualification", server_default="qualification"
    )
    amount: Mapped[float | None] = mapped_column(Numeric(15, 2, asdecimal=False))
    probability: Mapped[int | None] = mapped_column(Integer)
    close_date: Mapped[date | None] = mapped_column(Date)
    account_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("accounts.id", ondelete="SET NULL"), index=True
    )
    contact_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("contacts.id", ondelete="SET NULL"), index=True
    )
    lead_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("leads.id", ondelete="SET NULL"), index=True
    )
    description: Mapped[str | None] = mapped_column(Text)
    next_step: Mapped[str | None] = mapped_column(Text)
    source: Mapped[str | None] = mapped_column(String(100))


class Activity(Owned, Base):
    """A call, email, meeting, task or note about another record."""

    title = "activity"
    about = ("related_to", "related_id")
    __tablename__ = "activities"
    __table_args__ = (*list_indexes("activities", "type", "status", "related_id", "due_date"),)
    type: Mapped[str] = mapped_column(String(20))
    subject: Mapped[str | None] = mapped_column(String(300))
    body: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(20), default="scheduled", server_default="scheduled")
    priority: Mapped[str | None] = mapped_column(String(20))
    due_date: Mapped[date | None] = mapped_column(Date)
    due_time: Mapped[str | None] = mapped_column(String(8))
    related_to: Mapped[str | None] = mapped_column(String(20))
    related_id: Mapped[UUID | None]
    related_name: Mapped[str | None] = mapped_column(String(300))
    duration_minutes: Mapped[int | None] = mapped_column(Integer)
    outcome: Mapped[str | None] = mapped_column(Text)
    sentiment: Mapped[str | None] = mapped_column(String(20))


class Document(Owned, Base):
    """The description and address of a file; the file itself is stored elsewhere."""

    title = "document"
    about = ("related_type", "related_id")
    __tablename__ = "documents"
    __table_args__ = (*list_indexes("documents", "file_type", "related_id"),)
    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str | None] = mapped_column(Text)
    file_url: Mapped[str | None] = mapped_column(String(1000))
    file_type: Mapped[str | None] = mapped_column(String(100))
    file_size: Mapped[int | None] = mapped_column(Integer)
    related_type: Mapped[str | None] = mapped_column(String(20))
    related_id: Mapped[UUID | None]


class Task(Owned, Base):
    """Work for an employee or an agent."""

    title = "task"
    about = ("entity_type", "entity_id")
    __tablename__ = "tasks"
    __table_args__ = (*list_indexes("tasks", "status", "entity_id"),)
    description: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(20), default="PENDING", server_default="PENDING")
    entity_type: Mapped[str | None] = mapped_column(String(20))
    entity_id: Mapped[UUID | None]
    result: Mapped[str | None] = mapped_column(Text)


REFERABLE: dict[str, type[Owned]] = {
    model.kind: model for model in (Account, Lead, Contact, Opportunity, BizDevSource) if model.kind
}
"""The tables that polymorphic references may name, by ``kind``."""

REFERRING: tuple[type[Owned], ...] = (Activity, Document, Task)
"""The tables that have a polymorphic reference."""


class EntityTransition(Base):
    """The conversion or promotion of a record, with a copy of the record."""

    __tablename__ = "entity_transitions"
    __table_args__ = (Index("ix_entity_transitions_from", "tenant_id", "from_table", "from_id"),)
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    from_table: Mapped[str] = mapped_column(String(40))
    from_id: Mapped[UUID]
    to_table: Mapped[str] = mapped_column(String(40))
    to_id: Mapped[UUID]
    action: Mapped[str] = mapped_column(String(20))
    performed_by: Mapped[UUID | None] = mapped_column(
        ForeignKey("employees.id", ondelete="SET NULL")
    )
    performed_at: Mapped[datetime] = mapped_column(default=now, server_default=text("now()"))
    snapshot: Mapped[dict[str, Any]]
