"""Tasks: work for an employee or an agent."""

from crm import caching
from crm.models import RELATED, TASK_STATUS, Task
from crm.module import Module

tasks = Module(
    model=Task,
    plural="tasks",
    singular="task",
    cached=caching.tasks,
    required=("description",),
    choices={"status": TASK_STATUS, "entity_type": RELATED},
    filters=("status", "entity_type", "entity_id"),
    searched=(Task.description, Task.result),
    stats_by="status",
)
router = tasks.router()
tasks.add_records(router)
