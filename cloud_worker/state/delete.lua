-- Forget a session. KEYS: record. ARGV: session key
-- Whoever does not know the session's key has no right to it: keys are named by its SHA-1.
local home = 'midspan:{' .. redis.sha1hex(ARGV[1]) .. '}:'
for i = 1, #KEYS do
  if string.sub(KEYS[i], 1, #home) ~= home then
    return redis.error_reply('FOREIGN this session was not given to the caller')
  end
end
local record = redis.call('HMGET', KEYS[1], 'chunks', 'account')
local chunks, account, name = tonumber(record[1] or 0), record[2], redis.sha1hex(ARGV[1])
if account and account ~= '' then
  local known = redis.call('HMGET', account, name, 'total')
  local counted = string.match(known[1] or '', '^(%d+) %d+$')
  if counted then
    redis.call('HDEL', account, name)
    redis.call('HSET', account, 'total',
      string.format('%.0f', math.max(0, tonumber(known[2] or 0) - tonumber(counted))))
  end
end
for i = 0, chunks - 1 do
  redis.call('UNLINK', home .. 'kv:' .. i)
end
return redis.call('UNLINK', KEYS[1])
