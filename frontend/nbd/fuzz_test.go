package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"graindisk/frontend/nbd/proto"
)

// scriptConn plays a client that sends a script and hangs up, and records the answers.
type scriptConn struct {
	in  *bytes.Reader
	mu  sync.Mutex
	out bytes.Buffer
}

func (s *scriptConn) Read(p []byte) (int, error) { return s.in.Read(p) }

func (s *scriptConn) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.Write(p)
}

func (s *scriptConn) Close() error                     { return nil }
func (s *scriptConn) LocalAddr() net.Addr              { return &net.UnixAddr{Name: "script", Net: "unix"} }
func (s *scriptConn) RemoteAddr() net.Addr             { return s.LocalAddr() }
func (s *scriptConn) SetDeadline(time.Time) error      { return nil }
func (s *scriptConn) SetReadDeadline(time.Time) error  { return nil }
func (s *scriptConn) SetWriteDeadline(time.Time) error { return nil }

// play serves one scripted client to the end and returns what it was sent.
func play(t *testing.T, d Device, script []byte) []byte {
	exports := oneExport(d)
	s, err := New(Options{Exports: exports, InFlightBytes: 1 << 20, SlowReads: 2})
	if err != nil {
		t.Fatal(err)
	}
	sock := &scriptConn{in: bytes.NewReader(script)}
	newConn(context.Background(), s, sock, ListenOptions{}).serve()
	if n := exports.open.Load(); n != 0 {
		t.Errorf("%d exports were not released", n)
	}
	return sock.out.Bytes()
}

// FuzzHandshake feeds arbitrary bytes to the handshake: the answers must be a greeting and then
// well-formed option replies, up to the beginning of transmission.
func FuzzHandshake(f *testing.F) {
	for _, seed := range []string{
		``, `00000003`, `00000001 "IHAVEOPT" 00000001 00000004 "disk"`,
		`00000003 "IHAVEOPT" 00000008 00000000 "IHAVEOPT" 00000007 0000000c 00000004 "disk" 0001 0003`,
		`00000003 "IHAVEOPT" 00000006 0000000e 00000004 "disk" 0002 0001 0002 "IHAVEOPT" 00000003 00000000 "IHAVEOPT" 00000002 00000000`,
		`00000003 "IHAVEOPT" 0000000a 00000004 00000000 "IHAVEOPT" 00000007 00000006 ffffffff 0000`,
		`00000003 "IHAVEOPT" 0000000b 00000000 "IHAVEOPT" 0000000a 0000001f 00000004 "disk" 00000001 0000000f "base:allocation"`,
		`00000003 "IHAVEOPT" 00000008 00000000 "IHAVEOPT" 00000009 00000015 00000004 "disk" 00000001 00000005 "base:"`,
		`00000003 "IHAVEOPT" 0000000b 00000000 "IHAVEOPT" 00000008 00000000 "IHAVEOPT" 00000001 00000000`,
	} {
		f.Add(unhex(f, seed))
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		out := play(t, newFullDevice(64<<10), script)
		if len(out) < 18 {
			t.Fatalf("greeting %x", out)
		}
		exportName := bytes.Contains(script, unhex(t, `"IHAVEOPT" 00000001`))
		for p := out[18:]; len(p) > 0; {
			if len(p) < 20 || binary.BigEndian.Uint64(p) != proto.MagicOptionReply {
				if !exportName { // whose answer has no magic
					t.Fatalf("option reply %x", p)
				}
				return
			}
			n := int(binary.BigEndian.Uint32(p[16:]))
			if n > len(p)-20 {
				t.Fatalf("option reply %x of %d bytes", p, n)
			}
			if binary.BigEndian.Uint32(p[8:]) == proto.OptGo && binary.BigEndian.Uint32(p[12:]) == proto.RepAck {
				return
			}
			p = p[20+n:]
		}
	})
}

// request32 encodes one request with extended headers.
func request32(cmd proto.Cmd, flags uint16, cookie, off, n uint64) []byte {
	p := binary.BigEndian.AppendUint32(nil, proto.MagicExtendedRequest)
	p = append(p, request28(cmd, flags, cookie, off, 0)[4:24]...)
	return binary.BigEndian.AppendUint64(p, n)
}

// The styles of replies that a client may ask for.
const (
	styleSimple = iota
	styleStructured
	styleExtended
	styleCount
)

// FuzzTransmission feeds arbitrary bytes to the transmission phase and checks that the answers
// are well-formed replies, at most one for each request the script can hold.
func FuzzTransmission(f *testing.F) {
	requests := [][]byte{
		append(request28(proto.CmdWrite, proto.CmdFlagFUA, 1, 5, 3), "abc"...),
		request28(proto.CmdRead, 0, 2, 4, 4096),
		request28(proto.CmdRead, proto.CmdFlagDF, 3, 40<<10, 20<<10),
		request28(proto.CmdFlush, 0, 4, 0, 0),
		request28(proto.CmdTrim, 0, 5, 1, 60<<10),
		request28(proto.CmdWriteZeroes, proto.CmdFlagNoHole, 6, 4096, 4096),
		request28(proto.CmdBlockStatus, 0, 10, 3, 60<<10),
		request28(proto.CmdBlockStatus, proto.CmdFlagReqOne, 11, 0, 60<<10),
		request28(proto.CmdCache, 0, 12, 0, 60<<10),
		request28(proto.Cmd(77), 0xffff, 7, 1<<63, 1<<31),
		request28(proto.CmdWrite, 0, 8, 0, 33<<20),
		request28(proto.CmdDisc, 0, 9, 0, 0),
	}
	for style := range byte(styleExtended) {
		f.Add(style, bytes.Join(requests, nil))
		for _, p := range requests {
			f.Add(style, append(p, p...))
		}
	}
	wide := [][]byte{
		append(request32(proto.CmdWrite, proto.CmdFlagPayloadLen, 1, 5, 3), "abc"...),
		append(request32(proto.CmdFlush, proto.CmdFlagPayloadLen, 2, 0, 3), "abc"...),
		request32(proto.CmdWrite, 0, 3, 0, 1<<40),
		request32(proto.CmdRead, 0, 4, 30<<10, 10<<10),
		request32(proto.CmdBlockStatus, 0, 5, 1, 60<<10),
		request32(proto.CmdCache, 0, 6, 1, 60<<10),
		request32(proto.CmdWriteZeroes, proto.CmdFlagFastZero, 7, 1, 60<<10),
		request32(proto.CmdTrim, 0, 8, 1<<63, 1<<63),
		request32(proto.CmdRead, proto.CmdFlagPayloadLen, 9, 0, 1<<50),
	}
	f.Add(byte(styleExtended), bytes.Join(wide, nil))
	for _, p := range wide {
		f.Add(byte(styleExtended), append(p, p...))
	}
	f.Fuzz(func(t *testing.T, style byte, script []byte) {
		style %= styleCount
		start := unhex(t, `00000003`)
		if style != styleSimple {
			start = append(start, unhex(t, []string{styleStructured: option(t, `00000008`, ``), styleExtended: option(t, `0000000b`, ``)}[style])...)
		}
		start = append(start, unhex(t, option(t, `0000000a`, `00000004 "disk" 00000001 0000000f "base:allocation"`))...)
		start = append(start, unhex(t, option(t, `00000007`, `00000004 "disk" 0000`))...)
		d := newFullDevice(64 << 10)
		d.data[20<<10] = 1
		d.onTry = func(off int64, _ int) bool { return off < 32<<10 }
		out := play(t, d, append(start, script...))
		began := unhex(t, hexOptReply+`00000007 00000001 00000000`)
		at := bytes.Index(out, began)
		if at < 0 {
			t.Fatalf("no transmission: %x", out)
		}
		size := proto.RequestLen
		if style == styleExtended {
			size = proto.ExtendedRequestLen
		}
		checkReplies(t, out[at+len(began):], style, len(script)/size)
	})
}

// checkReplies checks the framing of a reply stream that holds at most limit replies. Data of a
// simple READ reply cannot be told from replies, so only the first of those is looked at.
func checkReplies(t *testing.T, p []byte, style byte, limit int) {
	n := 0
	for ; len(p) > 0; n++ {
		switch {
		case style != styleExtended && len(p) >= 16 && binary.BigEndian.Uint32(p) == proto.MagicSimpleReply:
			p = p[16:]
			if style == styleSimple {
				return
			}
		case style == styleStructured && len(p) >= 20 && binary.BigEndian.Uint32(p) == proto.MagicStructuredReply:
			p = checkChunk(t, p, 20, uint64(binary.BigEndian.Uint32(p[16:])))
		case style == styleExtended && len(p) >= 32 && binary.BigEndian.Uint32(p) == proto.MagicExtendedReply:
			p = checkChunk(t, p, 32, binary.BigEndian.Uint64(p[24:]))
		default:
			t.Fatalf("reply %x", p[:min(len(p), 32)])
		}
	}
	if n > limit {
		t.Fatalf("%d replies to at most %d requests", n, limit)
	}
}

// checkChunk checks a chunk that is all of a reply, its header of head bytes and its payload of size, and
// returns what follows it.
func checkChunk(t *testing.T, p []byte, head int, size uint64) []byte {
	if size > uint64(len(p)-head) || binary.BigEndian.Uint16(p[4:]) != proto.ReplyFlagDone {
		t.Fatalf("chunk %x", p[:head])
	}
	payload := p[head : head+int(size)]
	ok := false
	switch binary.BigEndian.Uint16(p[6:]) {
	case proto.ReplyTypeNone:
		ok = size == 0
	case proto.ReplyTypeOffsetData:
		ok = size > 8
	case proto.ReplyTypeError:
		ok = size > 6 && int(binary.BigEndian.Uint16(payload[4:])) == len(payload)-6
	case proto.ReplyTypeBlockStatus:
		ok = head == 20 && size > 4 && (size-4)%8 == 0
	case proto.ReplyTypeBlockStatusExt:
		ok = head == 32 && size > 8 && (size-8)/16 == uint64(binary.BigEndian.Uint32(payload[4:])) && (size-8)%16 == 0
	}
	if !ok {
		t.Fatalf("chunk %x", p[:head+int(min(size, 64))])
	}
	return p[head+int(size):]
}

// FuzzInbuf reads scripts through the buffer in pieces and expects the same bytes.
func FuzzInbuf(f *testing.F) {
	f.Add([]byte("some bytes to read in pieces"), []byte{4, 28, 0, 200})
	f.Fuzz(func(t *testing.T, data, sizes []byte) {
		a, b := net.Pipe()
		go func() {
			_, _ = a.Write(data)
			_ = a.Close()
		}()
		defer func() { _ = b.Close() }()
		in := inbuf{sock: b, settle: func() {}, b: make([]byte, 64)}
		rest := data
		for i, size := range sizes {
			var p []byte
			var err error
			n := int(size)
			switch i % 3 {
			case 0:
				n = min(n, 64)
				p, err = in.next(n)
			case 1:
				p = make([]byte, n)
				err = in.full(p)
			default:
				p = rest[:min(n, len(rest))]
				err = in.discard(int64(n))
			}
			if n > len(rest) {
				if err != io.ErrUnexpectedEOF && err != io.EOF {
					t.Fatalf("%d of %d bytes: %v", n, len(rest), err)
				}
				return
			}
			if err != nil || !bytes.Equal(p, rest[:n]) {
				t.Fatalf("read %x and %v, want %x", p, err, rest[:n])
			}
			rest = rest[n:]
		}
	})
}
