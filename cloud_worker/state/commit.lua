-- Check the fence and write rows in one atomic step; see cloud_worker/state/store.py for the rules.
-- KEYS: record, the chunk to write, then every other chunk of the session
-- ARGV: shape, generation, fork, step, writer, start, end, continues, byte offset in the chunk,
--       time to live in ms, rows, session key, the account's key (may be empty), for whoever deletes
-- Returns {code, position}; code is committed, stale or gap. A server that evicts may have dropped
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
redis.call('SETRANGE', KEYS[2], ARGV[9], ARGV[11])
local chunks = math.max(#KEYS - 1, tonumber(record[6] or 0)) -- a cut-back leaves some above it
redis.call('HSET', KEYS[1], 'shape', shape, 'generation', ARGV[2], 'step', ARGV[4],
  'writer', writer, 'position', ARGV[7], 'chunks', chunks, 'account', ARGV[13])
for i = 1, #KEYS do
  redis.call('PEXPIRE', KEYS[i], ARGV[10])
end
return {'committed', last}
