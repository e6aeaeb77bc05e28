"""respcache."""
