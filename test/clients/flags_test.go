package clients

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"graindisk/test/harness"
)

func pathEnv() string { return os.Getenv("PATH") }

// nbdsh runs a Python script with h connected to the disk, and the helpers of prelude.
func (s *server) nbdsh(t *testing.T, disk, script string) {
	t.Helper()
	// libnbd's module belongs to the distribution's interpreter, which need not come first in PATH.
	r := harness.Command(t, "/usr/bin/python3", "-c", prelude+script, s.uri(disk))
	if r.Code != 0 {
		t.Errorf("script%sexit %d\n%s%s", script, r.Code, r.Stdout, r.Stderr)
	}
}

// needNbdsh fails the test if libnbd's Python module is missing.
func needNbdsh(t *testing.T) {
	t.Helper()
	if r := harness.Command(t, "/usr/bin/python3", "-c", "import nbd"); r.Code != 0 {
		t.Fatalf("libnbd's Python module is not installed: run \"make test-tools\", or apt-get install python3-libnbd\n%s", r.Stderr)
	}
}

const prelude = `
import errno, nbd, sys
K, M, G = 1 << 10, 1 << 20, 1 << 30
def connect(simple=False, contexts=["base:allocation"]):
    h = nbd.NBD()
    h.set_strict_mode(0)  # let through what the server must refuse
    h.set_request_structured_replies(not simple)
    for c in contexts: h.add_meta_context(c)
    h.connect_uri(sys.argv[1])
    return h
def fails(code, f, *args, **kw):
    try:
        f(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == code, "%s, want %s" % (e, errno.errorcode[code])
        return
    raise AssertionError("no error, want %s" % errno.errorcode[code])
def data(n, seed=1):
    return bytes((i * 7 + i // 251 + seed) & 255 for i in range(n))
def same(got, want, what=""):
    if bytes(got) != bytes(want):
        at = next((i for i in range(min(len(got), len(want))) if got[i] != want[i]), -1)
        raise AssertionError("%s: %d bytes, want %d; first difference at %d" % (what, len(got), len(want), at))
def extents(h, n, off, flags=0):
    got = []
    def extent(context, at, entries, err):
        assert context == "base:allocation" and at == off, (context, at)
        got.extend(zip(entries[0::2], entries[1::2]))
    h.block_status(n, off, extent, flags)
    return got
HOLE = nbd.STATE_HOLE | nbd.STATE_ZERO
h = connect()
`

// flags are the flags that nbdinfo can tell of, as it calls them, each with a script that shows that
// it is true. A flag that is not offered has a script that shows that its command is refused.
var flags = map[string]struct {
	offered bool
	script  string
}{
	"can_flush": {true, `
h.pwrite(data(8*K), 4*K)
h.flush()
same(h.pread(8*K, 4*K), data(8*K))
`},
	"can_fua": {true, `
for n in [512, 4*K, 64*K + 512]:
    h.pwrite(data(n, n), 1*M + 512, nbd.CMD_FLAG_FUA)
    same(h.pread(n, 1*M + 512), data(n, n), "write")
h.zero(4*K, 1*M + 4*K, nbd.CMD_FLAG_FUA)
same(h.pread(4*K, 1*M + 4*K), bytes(4*K), "zero")
h.trim(8*K, 1*M + 8*K, nbd.CMD_FLAG_FUA)
same(h.pread(8*K, 1*M + 8*K), bytes(8*K), "trim")
same(h.pread(512, 1*M + 512), data(512, 64*K + 512), "the rest")
`},
	"can_multi_conn": {true, `
others = [connect() for i in range(4)]
for i, o in enumerate(others):
    o.pwrite(data(64*K, i), 2*M + i*32*K)       # each half over the one before
    for p in others + [h]:
        same(p.pread(64*K, 2*M + i*32*K), data(64*K, i), "seen by another connection")
h.flush()                                       # for all of them
`},
	"can_trim": {true, `
h.pwrite(data(64*K), 3*M)
h.trim(8*K, 3*M + 8*K)
same(h.pread(64*K, 3*M), data(64*K)[:8*K] + bytes(8*K) + data(64*K)[16*K:], "whole blocks")
h.pwrite(data(64*K), 3*M)
h.trim(16*K, 3*M + 512)
got = h.pread(64*K, 3*M)
same(got[:512], data(64*K)[:512], "before")
same(got[16*K + 512:], data(64*K)[16*K + 512:], "after")
same(got[4*K:16*K], bytes(12*K), "the whole blocks within")
`},
	"can_zero": {true, `
want = bytearray(data(256*K))
h.pwrite(want, 4*M)
for flags in [0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA]:
    for off, n in [(4*K, 4*K), (13*K, 1), (20*K - 1, 2), (33*K, 30*K + 7), (100*K, 100*K)]:
        off += flags * 512
        h.zero(n, 4*M + off, flags)
        want[off:off+n] = bytes(n)
        same(h.pread(256*K, 4*M), want, "flags %d, %d bytes at %d" % (flags, n, off))
`},
	"can_df": {true, `
h.pwrite(data(64*K), 5*M)
h.trim(16*K, 5*M + 16*K)
want = data(64*K)[:16*K] + bytes(16*K) + data(64*K)[32*K:]
chunks = []
def chunk(buf, off, status, err):
    chunks.append((off, len(buf), status))
same(h.pread_structured(64*K, 5*M, chunk, nbd.CMD_FLAG_DF), want)
assert chunks == [(5*M, 64*K, nbd.READ_DATA)], chunks
s = connect(simple=True)
assert not s.can_df()                           # only structured replies have it
same(s.pread(64*K, 5*M), want, "simple reply")
fails(errno.EINVAL, s.pread, 64*K, 5*M, nbd.CMD_FLAG_DF)
`},
	"can_fast_zero": {true, `
for flags in [nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA]:
    h.pwrite(data(16*K), 6*M)
    h.zero(8*K, 6*M + 4*K, flags)
    h.zero(4*K, 6*M, flags)
    same(h.pread(16*K, 6*M), bytes(12*K) + data(16*K)[12*K:], "fast")
    h.pwrite(data(16*K), 6*M)
    fails(errno.ENOTSUP, h.zero, 512, 6*M, flags)       # no faster than to write them
    fails(errno.ENOTSUP, h.zero, 16*K - 2, 6*M + 1, flags)
    fails(errno.ENOTSUP, h.zero, 4*K + 1, 6*M, flags)
    same(h.pread(16*K, 6*M), data(16*K), "refused")
`},
	"can_cache": {true, `
h.pwrite(data(64*K), 9*M)
h.cache(64*K, 9*M)
h.cache(h.get_size(), 0)
h.cache(1, h.get_size() - 1)
h.cache(0, 0)
same(h.pread(64*K, 9*M), data(64*K))
fails(errno.EINVAL, h.cache, 4*K, h.get_size() - 1)
connect(simple=True).cache(4*K, 0)
`},
	"can_meta_context base:allocation": {true, `
base = 16*M
h.zero(1*M, base)
assert extents(h, 1*M, base) == [(1*M, HOLE)]
h.pwrite(data(8*K), base + 64*K)
h.pwrite(data(100), base + 128*K + 50)
want = [(64*K, HOLE), (8*K, 0), (56*K, HOLE), (4*K, 0), (1*M - 132*K, HOLE)]
assert extents(h, 1*M, base) == want
assert extents(h, 1*M, base, nbd.CMD_FLAG_REQ_ONE) == want[:1]
assert extents(h, 10*K, base + 65*K, nbd.CMD_FLAG_REQ_ONE) == [(7*K, 0)]
assert extents(h, 1, base + 130*K) == [(1, 0)]
h.trim(4*K, base + 64*K)
h.zero(4*K, base + 128*K, nbd.CMD_FLAG_FUA)
assert extents(h, 1*M, base) == [(68*K, HOLE), (4*K, 0), (1*M - 72*K, HOLE)]
assert extents(connect(), 1*M, base) == extents(h, 1*M, base), "another connection"
fails(errno.EINVAL, extents, h, 4*K, h.get_size())
for without in [connect(contexts=[]), connect(simple=True), connect(contexts=["base:nothing", "qemu:dirty-bitmap:x"])]:
    assert not without.can_meta_context("base:allocation")
    fails(errno.EINVAL, extents, without, 4*K, 0)
`},
	"is_read_only": {false, `
h.pwrite(data(4*K), 7*M)
same(h.pread(4*K, 7*M), data(4*K))
`},
	"is_rotational": {false, `
assert not h.is_rotational()
`},
}

// TestEveryFlag has a script for every flag, and finds no flag without one.
func TestEveryFlag(t *testing.T) {
	harness.Need(t, "nbdinfo")
	needNbdsh(t)
	s := serve(t)
	var info struct{ Exports []map[string]any }
	if err := json.Unmarshal([]byte(harness.Must(t, "nbdinfo", "--json", s.uri("vm1"))), &info); err != nil {
		t.Fatal(err)
	}
	for key, value := range info.Exports[0] {
		if offered, isFlag := value.(bool); isFlag {
			if f, known := flags[key]; !known || f.offered != offered {
				t.Errorf("the export says %s is %v; tested is %v", key, offered, known && f.offered)
			}
		}
	}
	if contexts := fmt.Sprint(info.Exports[0]["contexts"]); contexts != "[base:allocation]" {
		t.Errorf("metadata contexts %s; tested is base:allocation", contexts)
	}
	for _, name := range slices.Sorted(maps.Keys(flags)) {
		t.Run(name, func(t *testing.T) {
			if _, told := info.Exports[0][name]; !told && !strings.Contains(name, " ") {
				t.Error("nbdinfo does not tell")
			}
			s.nbdsh(t, "vm1", flags[name].script)
		})
	}
}

// TestStableOutlivesKill writes through FUA and FLUSH on different connections and kills the gateway.
func TestStableOutlivesKill(t *testing.T) {
	needNbdsh(t)
	s := serve(t)
	s.nbdsh(t, "vm1", `
other = connect()
h.pwrite(data(100*K), 512)
other.flush()
other.pwrite(data(100*K, 2), 1*M + 512, nbd.CMD_FLAG_FUA)
h.trim(8*K, 8*K, nbd.CMD_FLAG_FUA)
h.zero(1000, 1*M + 1000, nbd.CMD_FLAG_FUA)
`)
	s.restart()
	s.nbdsh(t, "vm1", `
want = bytearray(data(100*K))
want[8*K - 512:16*K - 512] = bytes(8*K)
same(h.pread(100*K, 512), want, "write, flush, trim")
want = bytearray(data(100*K, 2))
want[1000 - 512:2000 - 512] = bytes(1000)
same(h.pread(100*K, 1*M + 512), want, "write, zero")
h.flush()
`)
}

// TestEdges asks for nothing, for too much, and for what is not there.
func TestEdges(t *testing.T) {
	needNbdsh(t)
	s := serve(t)
	for _, c := range []struct{ name, disk, script string }{
		{"requests of nothing succeed", "vm1", `
for simple in [False, True]:
    h = connect(simple)
    for off in [0, 5, h.get_size()]:
        same(h.pread(0, off), b"")
        h.pwrite(b"", off)
        h.trim(0, off)
        h.zero(0, off)
    h.pwrite(data(512), 0)
    same(h.pread(512, 0), data(512))
`},
		{"requests past the end fail and change nothing", "vm1", `
for simple in [False, True]:
    h = connect(simple)
    size = h.get_size()
    h.pwrite(data(4*K), size - 4*K)
    for off in [size - 512, size, size + 4*K, 1 << 62]:
        fails(errno.EINVAL, h.pread, 4*K, off)
        fails(errno.ENOSPC, h.pwrite, data(4*K, 9), off)
        fails(errno.EINVAL, h.trim, 4*K, off)
        fails(errno.ENOSPC, h.zero, 4*K, off)
    same(h.pread(4*K, size - 4*K), data(4*K))
    h.flush()
`},
		{"offsets beyond what 63 bits hold fail", "vm1", `
for off in [(1 << 63) - 1, (1 << 63), (1 << 64) - 1]:
    fails(errno.EINVAL, h.pread, 4*K, off)
    fails(errno.EINVAL, h.trim, 4*K, off)
same(h.pread(16, 0), h.pread(16, 0))
`},
		{"the largest payload passes and a larger fails", "vm2", `
big = data(1*M) * 32
h.pwrite(big, 512)
same(h.pread(32*M, 512), big)
fails(errno.EINVAL, h.pwrite, big + b"x", 0)
fails(errno.EINVAL, h.pread, 32*M + 1, 0)
same(h.pread(32*M, 512), big, "afterwards")
`},
		{"single bytes anywhere", "vm1", `
want = bytearray(data(16*K))
h.pwrite(want, 8*M)
for off in [0, 1, 511, 4095, 4096, 9000, 16*K - 1]:
    h.pwrite(bytes([want[off] ^ 255]), 8*M + off)
    want[off] ^= 255
    same(h.pread(1, 8*M + off), want[off:off+1])
same(h.pread(16*K, 8*M), want)
same(h.pread(9000, 8*M + 77), want[77:9077])
`},
		{"the whole of a large disk, 2 GiB at a time", "big", `
size = h.get_size()
places = [0, 5*G + 512, size // 2 - 4*K, size - 64*K]
for op in [h.trim, h.zero]:
    for p in places: h.pwrite(data(64*K), p)
    cookies = []
    for off in range(0, size, 2*G):
        if op == h.trim: cookies.append(h.aio_trim(2*G, off))
        else: cookies.append(h.aio_zero(2*G, off, flags=nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO))
        while h.aio_in_flight() > 64: h.poll(-1)
    while h.aio_in_flight(): h.poll(-1)
    assert all(h.aio_command_completed(c) for c in cookies)
    h.flush()
    for p in places: same(h.pread(64*K, p), bytes(64*K), "at %d" % p)
    got, off = [], 0
    while off < size:
        es = extents(h, min(size - off, 4*G - 4*K), off)
        got += es
        off += sum(n for n, _ in es)
    assert off == size and all(e[1] == HOLE for e in got), got[:8]
`},
		{"unknown flags and commands fail", "vm1", `
fails(errno.EINVAL, h.pwrite, data(4*K), 0, nbd.CMD_FLAG_NO_HOLE)
fails(errno.EINVAL, h.pread, 4*K, 0, nbd.CMD_FLAG_REQ_ONE)
fails(errno.EINVAL, h.trim, 4*K, 0, nbd.CMD_FLAG_FAST_ZERO)
h.flush()
`},
		{"trim and zero of almost 4 GiB on an empty disk", "big", `
last = h.get_size() - 4*G
most = 4*G - 4*K
h.trim(most, 0)
h.zero(most, last)
h.pwrite(data(64*K), last + most - 64*K)
h.pwrite(data(4*K, 2), last + most)
h.zero(most, last, nbd.CMD_FLAG_NO_HOLE)
same(h.pread(1*M, last + most - 1*M), bytes(1*M), "zeroed")
same(h.pread(4*K, last + most), data(4*K, 2), "behind it")
h.trim(4*G - 1, last)
same(h.pread(4*K, last + most), data(4*K, 2), "a block trimmed but for its last byte")
`},
		{"many requests in flight, each answered", "vm2", `
buf = {i: nbd.Buffer.from_bytearray(bytearray(data(12*K, i))) for i in range(200)}
for i in buf: h.aio_pwrite(buf[i], 12*K * i)
while h.aio_in_flight(): h.poll(-1)
back = {i: nbd.Buffer(12*K) for i in buf}
cookies = [h.aio_pread(back[i], 12*K * i) for i in buf]
while h.aio_in_flight(): h.poll(-1)
assert all(h.aio_command_completed(c) for c in cookies)
for i in buf: same(back[i].to_bytearray(), data(12*K, i), "write %d" % i)
`},
	} {
		t.Run(c.name, func(t *testing.T) { s.nbdsh(t, c.disk, c.script) })
	}
}
