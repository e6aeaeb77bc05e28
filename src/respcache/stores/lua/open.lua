-- Creates a generation, or keeps a complete one of this server life and epoch.
-- KEYS: generation. ARGV: epoch prefix, nonce, time to live in ms.
-- Replaces anything else. Returns {identity, nonce, sequence}.
local id = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
local head = redis.pcall('HMGET', KEYS[1], 'r', 'n', 's')
if head.err or head[1] ~= ARGV[1] .. id or not head[2]
  or not string.match(head[3] or '', '^%d+$') then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'n', ARGV[2], 'r', ARGV[1] .. id, 's', 0)
  head = {id, ARGV[2], '0'}
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {id, head[2], head[3]}
