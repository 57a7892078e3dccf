-- Count a session for an account, unless that has its share; see cloud_worker/state/share.py.
-- KEYS: the account. ARGV: the session's name, its bytes, its time to live in ms, the share in bytes
-- Returns granted or over.
-- The hash has bytes and expiry of each session, and their total: one key cannot be lost by half. A
-- session counts for the most that it ever had, as a cut-back leaves chunks. Entries that nobody
-- renews expire; what is over its share adds up anew what is left, at most 360 times in a session's
-- time to live.
local account, name, time_to_live = KEYS[1], ARGV[1], tonumber(ARGV[3])
local most = tonumber(ARGV[4])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local known = redis.call('HMGET', account, name, 'total', 'summed_at')
local counted = tonumber(string.match(known[1] or '0 0', '^(%d+) %d+$') or 0)
local wanted = math.max(counted, tonumber(ARGV[2]))
local total = tonumber(known[2] or 0) - counted + wanted
if total > most and now - tonumber(known[3] or 0) >= time_to_live / 360 then
  total = wanted
  local all = redis.call('HGETALL', account)
  for i = 1, #all, 2 do
    local bytes, ends = string.match(all[i + 1], '^(%d+) (%d+)$')
    if bytes and all[i] ~= name then
      if tonumber(ends) < now then
        redis.call('HDEL', account, all[i])
      else
        total = total + tonumber(bytes)
      end
    end
  end
  redis.call('HSET', account, 'total', string.format('%.0f', total - wanted + counted),
    'summed_at', string.format('%.0f', now))
end
if total > most and wanted > counted then
  return 'over'
end
redis.call('HSET', account, name, string.format('%.0f %.0f', wanted, now + time_to_live),
  'total', string.format('%.0f', total))
redis.call('PEXPIRE', account, ARGV[3])
return 'granted'
