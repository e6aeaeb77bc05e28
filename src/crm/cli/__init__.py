"""The command line of the CRM: ``python -m crm``."""
