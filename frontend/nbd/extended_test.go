package nbd

import (
	"fmt"
	"strings"
	"testing"

	"graindisk/vdisk"
)

// The vectors below are written by hand from the specification of the extension: requests of 32 bytes (magic
// 21e41c71, u16 flags, u16 type, u64 cookie, u64 offset, u64 length) and replies of 32 bytes (magic 6e8a278c,
// u16 flags, u16 type, u64 cookie, u64 offset of the request, u64 length of the payload).
const (
	hexExtRequest = `21e41c71`
	hexExtReply   = `6e8a278c`
)

func TestExtendedHandshakeBytes(t *testing.T) {
	ack := func(opt string) string { return optionReply(t, opt, `00000001`, ``) }
	ask, acked := option(t, `0000000b`, ``), ack(`0000000b`)
	info := func(flags string) string {
		return optionReply(t, `00000006`, `00000003`, `0000 0000000000010000`+flags) + ack(`00000006`)
	}
	asks := option(t, `00000006`, `00000004 "disk" 0000`)
	for _, tt := range []struct {
		name  string
		steps [][2]string
		eof   bool
	}{
		{"asked for", [][2]string{{ask, acked}, {asks, info(`0ded`)}}, false},
		{"asked for twice", [][2]string{{ask, acked}, {ask, acked}}, false},
		{"after structured replies", [][2]string{{option(t, `00000008`, ``), ack(`00000008`)}, {ask, acked}}, false},
		{"structured replies after it", [][2]string{{ask, acked},
			{option(t, `00000008`, ``), optionReply(t, `00000008`, `8000000a`, `"extended headers are in use"`)}}, false},
		{"with data", [][2]string{{option(t, `0000000b`, `00`),
			optionReply(t, `0000000b`, `80000003`, `"EXTENDED_HEADERS takes no data"`)}, {asks, info(`0d6d`)}}, false},
		{"contexts need nothing else", [][2]string{{ask, acked}, {option(t, `0000000a`, `00000004 "disk" 00000001 0000000f "base:allocation"`),
			optionReply(t, `0000000a`, `00000004`, `00000001 "base:allocation"`) + ack(`0000000a`)}}, false},
		{"EXPORT_NAME after it ends it", [][2]string{{ask, acked}, {option(t, `00000001`, `"disk"`), ``}}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := startServer(t, Options{Exports: oneExport(newFullDevice(64 << 10))}, ListenOptions{})
			r := s.raw()
			r.expect(hexGreeting)
			r.send(`00000003`)
			for _, step := range tt.steps {
				r.send(step[0])
				r.expect(step[1])
			}
			if tt.eof {
				r.expectEOF()
			}
		})
	}
}

// extError is an error chunk to a request at off.
func extError(off, code, text string) string {
	return fmt.Sprintf(`%s 0001 8001 00000000000000aa %s %016x %s %04x "%s"`, hexExtReply, off, 6+len(text), code, len(text), text)
}

// TestExtendedBytes touches every command. The export has 64 KiB.
func TestExtendedBytes(t *testing.T) {
	const (
		cookie = `00000000000000aa`
		at0    = `0000000000000000`
		at5    = `0000000000000005`
		einval = "EINVAL: invalid request"
		big    = `0000010000000000` // 1 TiB
	)
	none := func(off string) string { return hexExtReply + `0001 0000` + cookie + off + at0 }
	inval := func(off string) string { return extError(off, `00000016`, einval) }
	nospc := func(off string) string { return extError(off, `0000001c`, "ENOSPC: no space left on device") }
	steps := []struct{ name, send, expect string }{
		{"WRITE", `0020 0001` + cookie + at5 + `0000000000000003 "abc"`, none(at5)},
		{"WRITE with FUA", `0021 0001` + cookie + at5 + `0000000000000003 "abd"`, none(at5)},
		{"WRITE of nothing", `0020 0001` + cookie + at5 + at0, none(at5)},
		{"READ", `0000 0000` + cookie + `0000000000000004 0000000000000005`,
			hexExtReply + `0001 0001` + cookie + `0000000000000004 000000000000000d 0000000000000004 00 "abd" 00`},
		{"READ with DF", `0004 0000` + cookie + `0000000000000005 0000000000000001`,
			hexExtReply + `0001 0001` + cookie + at5 + `0000000000000009` + at5 + `"a"`},
		{"READ of nothing", `0000 0000` + cookie + at5 + at0, none(at5)},
		{"FLUSH", `0000 0003` + cookie + at0 + at0, none(at0)},
		{"TRIM", `0000 0004` + cookie + `0000000000001000 0000000000001000`, none(`0000000000001000`)},
		{"WRITE_ZEROES", `0000 0006` + cookie + `0000000000000006 0000000000000001`, none(`0000000000000006`)},
		{"WRITE_ZEROES with NO_HOLE, FAST_ZERO and FUA", `0013 0006` + cookie + `0000000000001000 0000000000001000`, none(`0000000000001000`)},
		{"FAST_ZERO from within a block is not fast", `0010 0006` + cookie + `0000000000000fff 0000000000001001`,
			extError(`0000000000000fff`, `0000005f`, "ENOTSUP: not supported")},
		{"FAST_ZERO up to within a block is not fast", `0010 0006` + cookie + `0000000000000000 0000000000001001`,
			extError(`0000000000000000`, `0000005f`, "ENOTSUP: not supported")},
		{"CACHE", `0000 0005` + cookie + at0 + `0000000000010000`, none(at0)},
		{"BLOCK_STATUS", `0000 0007` + cookie + at0 + `0000000000010000`, hexExtReply + `0001 0006` + cookie + at0 + `0000000000000028
			00000001 00000002  0000000000001000 00000000 00000000  000000000000f000 00000000 00000003`},
		{"BLOCK_STATUS with REQ_ONE", `0008 0007` + cookie + `0000000000001001 0000000000000fff`, hexExtReply + `0001 0006` + cookie +
			`0000000000001001 0000000000000018 00000001 00000001  0000000000000fff 00000000 00000003`},
		{"READ past the end", `0000 0000` + cookie + `000000000000ffff 0000000000000002`, inval(`000000000000ffff`)},
		{"READ over 32 MiB", `0000 0000` + cookie + at0 + `0000000002000001`, inval(at0)},
		{"READ of 1 TiB", `0000 0000` + cookie + at0 + big, inval(at0)},
		{"TRIM of 1 TiB", `0000 0004` + cookie + at0 + big, inval(at0)},
		{"WRITE_ZEROES of 1 TiB", `0000 0006` + cookie + at0 + big, nospc(at0)},
		{"CACHE of 1 TiB", `0000 0005` + cookie + at0 + big, inval(at0)},
		{"BLOCK_STATUS of 1 TiB", `0000 0007` + cookie + at0 + big, inval(at0)},
		{"a length of 2^64-1", `0000 0004` + cookie + `0000000000000001 ffffffffffffffff`, inval(`0000000000000001`)},
		{"a length of 2^63", `0000 0006` + cookie + at0 + `8000000000000000`, inval(at0)},
		{"a sum beyond 2^63", `0000 0006` + cookie + `7fffffffffffffff 7fffffffffffffff`, inval(`7fffffffffffffff`)},
		{"WRITE without PAYLOAD_LEN brings no data", `0000 0001` + cookie + at5 + `0000000000000003`, inval(at5)},
		{"WRITE past the end; its data are skipped", `0020 0001` + cookie + `000000000000fffe 0000000000000003 "xyz"`, nospc(`000000000000fffe`)},
		{"READ with data, which are skipped", `0020 0000` + cookie + at0 + `0000000000000003 "xyz"`, inval(at0)},
		{"FLUSH with data, which are skipped", `0020 0003` + cookie + at0 + `0000000000000003 "xyz"`, inval(at0)},
		{"BLOCK_STATUS with data, which are skipped", `0020 0007` + cookie + at0 + `0000000000000003 "xyz"`, inval(at0)},
		{"an unknown command with data, which are skipped", `0020 beef` + cookie + at0 + `0000000000000003 "xyz"`, inval(at0)},
		{"an unknown flag", `0040 0003` + cookie + at0 + at0, inval(at0)},
		{"the bytes are as they were", `0000 0000` + cookie + `0000000000000004 0000000000000005`,
			hexExtReply + `0001 0001` + cookie + `0000000000000004 000000000000000d 0000000000000004 00 "a" 00 "d" 00`},
	}
	s := startServer(t, Options{Exports: oneExport(newFullDevice(64 << 10))}, ListenOptions{})
	r := s.raw()
	r.goFull(true)
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			r.t = t
			r.send(hexExtRequest + step.send)
			r.expect(step.expect)
			r.send(hexExtRequest + `0000 0003 00000000000000ff` + at0 + at0) // the stream is in step
			r.expect(hexExtReply + `0001 0000 00000000000000ff` + at0 + at0)
		})
	}
	r.t = t
	r.send(hexExtRequest + `0000 0002` + cookie + at0 + at0) // DISC
	r.expectEOF()
}

func TestBrokenExtendedStreamsAreCut(t *testing.T) {
	for _, tt := range []struct{ name, send string }{
		{"a compact request", hexRequest + `0000 0003 00000000000000aa 0000000000000000 0000000000000000`},
		{"a reply", hexExtReply + `0000 0003 00000000000000aa 0000000000000000 0000000000000000`},
		{"a write over 32 MiB", hexExtRequest + `0020 0001 00000000000000aa 0000000000000000 0000000002000001`},
		{"a write of 2^64-1", hexExtRequest + `0020 0001 00000000000000aa 0000000000000000 ffffffffffffffff`},
		{"data of 2^40 on FLUSH", hexExtRequest + `0020 0003 00000000000000aa 0000000000000000 0000010000000000`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := startServer(t, Options{Exports: oneExport(newFullDevice(64 << 10))}, ListenOptions{})
			r := s.raw()
			r.goFull(true)
			r.send(tt.send)
			r.expectEOF()
		})
	}
}

// TestExtendedPieces checks chunks that come at different times: each header has the request's offset, each
// payload its own.
func TestExtendedPieces(t *testing.T) {
	d := newPieceDevice(1 << 20)
	copy(d.data[0x1000:], "abcdefgh")
	d.plan = planOf([]Part{{From: 2, To: 4}, {From: 6, To: 7, Hole: true}}, []Part{{From: 0, To: 2, Err: vdisk.ErrDamaged}},
		[]Part{{From: 4, To: 6}, {From: 7, To: 8}})
	const (
		cookie = `00000000000000aa`
		at     = `0000000000001000`
	)
	r := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{}).raw()
	r.goFull(true)
	r.send(hexExtRequest + `0000 0000` + cookie + at + `0000000000000008`)
	r.expect(hexExtReply + `0000 0001` + cookie + at + `000000000000000a 0000000000001002 "cd"`)
	r.expect(hexExtReply + `0000 0002` + cookie + at + `000000000000000c 0000000000001006 00000001`)
	r.expect(hexExtReply + `0000 8002` + cookie + at + `0000000000000025 00000005 0017 "EIO: input/output error"` + at)
	r.expect(hexExtReply + `0000 0001` + cookie + at + `000000000000000a 0000000000001004 "ef"`)
	r.expect(hexExtReply + `0001 0001` + cookie + at + `0000000000000009 0000000000001007 "h"`)
}

// TestExtendedLargestPayload reads and writes 32 MiB.
func TestExtendedLargestPayload(t *testing.T) {
	d := newFullDevice(40 << 20)
	r := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{}).raw()
	r.goFull(true)
	r.send(hexExtRequest + `0020 0001 00000000000000aa 0000000000000001 0000000002000000`)
	r.sendBytes([]byte(strings.Repeat("z", 32<<20)))
	r.expect(hexExtReply + `0001 0000 00000000000000aa 0000000000000001 0000000000000000`)
	r.send(hexExtRequest + `0000 0000 00000000000000ab 0000000000000001 0000000002000000`)
	r.expect(hexExtReply + `0001 0001 00000000000000ab 0000000000000001 0000000002000008 0000000000000001`)
	r.expect(`"` + strings.Repeat("z", 32<<20) + `"`)
}
