-- KEYS: epoch record. ARGV: record, token that may be replaced (or ''), ttl in ms. A record begins with its token and the
-- identity of its server; its pattern is that of core/epochs.py. Keeps one of this server life unless it has that token. Returns {identity, record in force}.
local id = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
local held = redis.pcall('GET', KEYS[1])
if type(held) == 'string' then
  local token, identity = string.match(held, '^([0-9a-f]+) ([0-9a-f]+) [!-~]+ %d+%.%d+ %d+:%d+:[%d,]*$')
  if identity == id and token ~= ARGV[2] then
    return {id, held}
  end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return {id, ARGV[1]}
