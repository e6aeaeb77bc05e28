-- Advances a generation's sequence and records it for every tag.
-- KEYS: generation. ARGV: epoch prefix, time to live in ms, maximum number of fields, size of the
-- ring in rows, number of row ids, channel, row ids, tags.
-- Returns {identity of this server life, nonce, sequence that the generation has reached}, or the
-- identity alone if there is no generation (any more). Publishes each change, if permitted.
-- A missing generation: nothing depends on it. A generation of another server life or epoch, one
-- that lost a part of its head (its sequence would restart under the same nonce), or a value of
-- another type is deleted. If all row ids were applied before, nothing is left to do. Otherwise the
-- sequence advances and is recorded for every tag. Too many fields are compacted by raising the
-- floor to the new sequence, which invalidates everything.
local id = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
local head = redis.pcall('HMGET', KEYS[1], 'r', 'n', 's', 'x')
if head.err or head[1] ~= ARGV[1] .. id or not head[2]
  or not string.match(head[3] or '', '^%d+$') then
  redis.call('DEL', KEYS[1])
  redis.pcall('PUBLISH', ARGV[6], KEYS[1])
  return {id}
end
local rows, ring, new, sequence = tonumber(ARGV[5]), head[4] or '', '', head[3]
for i = 7, 6 + rows do
  if not string.find(ring, ARGV[i], 1, true) then
    new = new .. ' ' .. ARGV[i]
  end
end
if rows == 0 or new ~= '' then
  sequence = redis.call('HINCRBY', KEYS[1], 's', 1)
  for i = 7 + rows, #ARGV do
    redis.call('HSET', KEYS[1], ARGV[i], sequence)
  end
  if new ~= '' then
    redis.call('HSET', KEYS[1], 'x', string.sub(ring .. new, -17 * tonumber(ARGV[4])))
  end
  if redis.call('HLEN', KEYS[1]) > tonumber(ARGV[3]) then
    redis.call('DEL', KEYS[1])
    redis.call('HSET', KEYS[1], 'n', head[2], 'r', head[1], 's', sequence, '*', sequence)
  end
  redis.pcall('PUBLISH', ARGV[6], KEYS[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {id, head[2], sequence}
