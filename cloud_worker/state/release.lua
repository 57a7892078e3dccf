-- A session is no longer counted. KEYS: the account. ARGV: the session's name
local known = redis.call('HMGET', KEYS[1], ARGV[1], 'total')
local counted = string.match(known[1] or '', '^(%d+) %d+$')
if counted then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HSET', KEYS[1], 'total',
    string.format('%.0f', math.max(0, tonumber(known[2] or 0) - tonumber(counted))))
end
return counted
