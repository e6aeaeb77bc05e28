-- Stores an epoch, unless one of this server life is in force whose token may not be replaced.
-- KEYS: epoch record. ARGV: record, token that may be replaced (or ''), time to live in ms.
-- A record begins with its token and its server's identity; its pattern is that of core/epochs.py.
-- Returns {identity, record in force}.
local id = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
local present = redis.pcall('GET', KEYS[1])
if type(present) == 'string' then
  local pattern = '^([0-9a-f]+) ([0-9a-f]+) [!-~]+ %d+%.%d+ %d+:%d+:[%d,]*$'
  local token, identity = string.match(present, pattern)
  if identity == id and token ~= ARGV[2] then
    return {id, present}
  end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return {id, ARGV[1]}
