-- Check the fence and write rows in one atomic step; see cloud_worker/state/store.py for the rules.
-- KEYS: record, the chunk to write, then every other chunk of the session
-- ARGV: shape, generation, fork, step, writer, start, end, continues, byte offset in the chunk,
--       time to live in ms, rows, session key, account (may be empty), bytes to count for the
--       session, bytes that an account may have
-- Returns {code, position}; code is committed, stale, gap or over (the account's share). A server that evicts may have dropped
-- any of these keys: a chunk that is not there, or shorter than the record says, is a gap.
-- Whoever does not know the session's key has no right to it: keys are named by its SHA-1.
local home = 'midspan:{' .. redis.sha1hex(ARGV[12]) .. '}:'
for i = 1, #KEYS do
  if string.sub(KEYS[i], 1, #home) ~= home then
    return redis.error_reply('FOREIGN this session was not given to the caller')
  end
end
local record = redis.call('HMGET', KEYS[1], 'shape', 'generation', 'step', 'writer', 'position',
  'chunks')
local shape, generation, fork = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local step, writer = tonumber(ARGV[4]), ARGV[5]
local first, last, continues = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8] == '1'
local offset, row_bytes = tonumber(ARGV[9]), #ARGV[11] / (last - first)
local held = redis.call('STRLEN', KEYS[2])
local valid = 0
if record[2] then
  local record_generation, record_step = tonumber(record[2]), tonumber(record[3])
  local position = tonumber(record[5])
  if record_generation > generation then
    return {'stale', position}
  end
  if record_generation == generation then
    if record_step > step then
      return {'stale', position}
    end
    if record_step == step then
      if position >= last and held >= offset + #ARGV[11] then
        return {'committed', position}
      end
      if continues and record[4] ~= writer then
        return {'stale', position}
      end
    end
  end
  if record[1] == shape then
    if record_generation == generation then
      valid = position
    elseif record_generation == generation - 1 then
      valid = math.min(position, fork)
    end
  end
end
if first > valid then
  return {'gap', valid}
end
if held < offset then
  return {'gap', first - math.ceil((offset - held) / row_bytes)}
end
for i = 3, #KEYS do -- chunks before this one, from the first on
  if redis.call('EXISTS', KEYS[i]) == 0 then
    return {'gap', (i - 3) * (first - offset / row_bytes) / (#KEYS - 2)}
  end
end
-- The account's hash has bytes and expiry of each session, and their total. A session counts for the
-- most that it ever had, as a cut-back leaves chunks. Entries that nobody renews expire; what is
-- over its share adds up anew what is left, at most 360 times in a session's time to live.
local account = ''
if ARGV[13] ~= '' then
  account = 'midspan:account:' .. redis.sha1hex(ARGV[13])
  local name, time_to_live, most = redis.sha1hex(ARGV[12]), tonumber(ARGV[10]), tonumber(ARGV[15])
  local clock = redis.call('TIME')
  local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
  local known = redis.call('HMGET', account, name, 'total', 'summed_at')
  local counted, expiry = string.match(known[1] or '0 0', '^(%d+) (%d+)$')
  counted, expiry = tonumber(counted or 0), tonumber(expiry or 0)
  local wanted = math.max(counted, tonumber(ARGV[14]))
  if wanted > counted or expiry - now < time_to_live * 0.75 then
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
      return {'over', valid}
    end
    redis.call('HSET', account, name, string.format('%.0f %.0f', wanted, now + time_to_live),
      'total', string.format('%.0f', total))
    redis.call('PEXPIRE', account, ARGV[10])
  end
end
redis.call('SETRANGE', KEYS[2], ARGV[9], ARGV[11])
local chunks = math.max(#KEYS - 1, tonumber(record[6] or 0)) -- a cut-back leaves some above it
redis.call('HSET', KEYS[1], 'shape', shape, 'generation', ARGV[2], 'step', ARGV[4],
  'writer', writer, 'position', ARGV[7], 'chunks', chunks, 'account', account)
for i = 1, #KEYS do
  redis.call('PEXPIRE', KEYS[i], ARGV[10])
end
return {'committed', last}
