"""What is cached: one line per route. The tables are those that the handler reads; writes to them invalidate its answers.

Nothing else has to be remembered: writes are seen at the database engine. Lists of rows that show the name of their account
read ``accounts`` too.
"""

from respcache.fastapi import cache_detail, cache_list

accounts_list = cache_list("accounts", tables=["accounts"])
accounts_search = cache_list("accounts", tables=["accounts"])
accounts_detail = cache_detail("accounts", tables=["accounts"])
accounts_people = cache_list("accounts", tables=["accounts", "contacts", "leads"])

leads_list = cache_list("leads", tables=["leads", "accounts"])
leads_detail = cache_detail("leads", tables=["leads", "accounts"])

contacts_list = cache_list("contacts", tables=["contacts", "accounts"])
contacts_search = cache_list("contacts", tables=["contacts", "accounts"])
contacts_detail = cache_detail("contacts", tables=["contacts", "accounts"])

bizdevsources_list = cache_list("bizdevsources", tables=["bizdev_sources", "accounts"])
bizdevsources_detail = cache_detail("bizdevsources", tables=["bizdev_sources", "accounts"])
