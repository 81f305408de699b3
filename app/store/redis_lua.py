"""What Redis does in one step for the journal, as Lua: look, load, write by compare-and-set, leases and the board.

Scripts run alone, so each is a transaction. Those that may fail for want of memory write their largest part first, so
that a refused write leaves nothing. Which keys there are is app.store.redis' affair.
"""

from __future__ import annotations

from typing import Final

# KEYS: meta events models jobs · ARGV: prefix of model keys, uid of the last event seen ('*': send no events), its seq
LOOK: Final = """
local meta = redis.call('HMGET', KEYS[1], 'last', 'models', 'jobs')
local lost = 0
local names = redis.call('SMEMBERS', KEYS[3])
for _, name in ipairs(names) do
  if redis.call('EXISTS', ARGV[1] .. name) == 0 then lost = lost + 1 end
end
if tonumber(meta[2] or '0') ~= #names or tonumber(meta[3] or '0') ~= redis.call('HLEN', KEYS[4]) then lost = lost + 1 end
if not meta[1] and redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4]) > 0 then lost = lost + 1 end
local entries = {}
if ARGV[2] ~= '*' and (meta[1] or '') ~= ARGV[2] then entries = redis.call('XRANGE', KEYS[2], ARGV[3] .. '-0', '+') end
local now = redis.call('TIME')
return {meta[1] or '', lost, entries, now[1] .. '.' .. string.format('%06d', now[2])}
"""

# KEYS: meta events models jobs · ARGV: prefix of model keys
LOAD: Final = """
local meta = redis.call('HMGET', KEYS[1], 'last', 'rest')
local models = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local state = redis.call('HGET', ARGV[1] .. name, 'state')
  if state then models[#models + 1] = state end
end
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
return {meta[1] or '', meta[2] or '', models, redis.call('HVALS', KEYS[4]), top[1] and top[1][1] or '0-0'}
"""

# KEYS: meta events models jobs · ARGV: prefix of model keys, uid that must still be the last, the change as JSON, events to keep
WRITE: Final = """
if (redis.call('HGET', KEYS[1], 'last') or '') ~= ARGV[2] then return 0 end
local change = cjson.decode(ARGV[3])
for _, entry in ipairs(change.events) do
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], entry[1], 'uid', entry[2], 'event', entry[3])
end
if change.whole then
  for _, name in ipairs(redis.call('SMEMBERS', KEYS[3])) do redis.call('DEL', ARGV[1] .. name) end
  redis.call('DEL', KEYS[3], KEYS[4])
end
for name, fields in pairs(change.models) do
  for field, value in pairs(fields) do redis.call('HSET', ARGV[1] .. name, field, value) end
  redis.call('SADD', KEYS[3], name)
end
for _, name in ipairs(change.gone) do
  redis.call('DEL', ARGV[1] .. name)
  redis.call('SREM', KEYS[3], name)
end
for id, job in pairs(change.jobs) do redis.call('HSET', KEYS[4], id, job) end
for _, id in ipairs(change.forgotten) do redis.call('HDEL', KEYS[4], id) end
for field, value in pairs(change.meta) do redis.call('HSET', KEYS[1], field, value) end
redis.call('HSET', KEYS[1], 'models', redis.call('SCARD', KEYS[3]), 'jobs', redis.call('HLEN', KEYS[4]))
return 1
"""

# KEYS: lease · ARGV: holder, milliseconds
ACQUIRE: Final = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

# KEYS: lease · ARGV: holder
RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""

# KEYS: value, index of the board · ARGV: name, value, milliseconds
POST: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
return 1
"""

# KEYS: index of the board · ARGV: prefix of board keys, prefix of names
BOARD: Final = """
local found = {}
for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local value = string.sub(name, 1, #ARGV[2]) == ARGV[2] and redis.call('GET', ARGV[1] .. name)
  if value then found[#found + 1] = name; found[#found + 1] = value end
end
return found
"""
