package nbd

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"graindisk/vdisk"
)

// optionReply is the reply to an option, with the payload in hex.
func optionReply(t testing.TB, opt, typ, payload string) string {
	t.Helper()
	return fmt.Sprintf(`%s %s %s %08x %s`, hexOptReply, opt, typ, len(unhex(t, payload)), payload)
}

// option is an option with data in hex.
func option(t testing.TB, opt, data string) string {
	t.Helper()
	return fmt.Sprintf(`"IHAVEOPT" %s %08x %s`, opt, len(unhex(t, data)), data)
}

// TestMetaContextBytes chooses metadata contexts in every right and wrong way.
func TestMetaContextBytes(t *testing.T) {
	const (
		list, set  = `00000009`, `0000000a`
		disk       = `00000004 "disk"`
		allocation = `0000000f "base:allocation"`
	)
	ack := func(opt string) string { return optionReply(t, opt, `00000001`, ``) }
	invalid := func(opt, text string) string { return optionReply(t, opt, `80000003`, `"`+text+`"`) }
	has := func(opt, id string) string {
		return optionReply(t, opt, `00000004`, id+`"base:allocation"`) + ack(opt)
	}
	malformed := func(opt string) string { return invalid(opt, "malformed request for metadata contexts") }
	structured := [2]string{option(t, `00000008`, ``), ack(`00000008`)}
	for _, tt := range []struct {
		name  string
		steps [][2]string // what is sent, what is answered
	}{
		{"without structured replies", [][2]string{
			{option(t, list, disk+`00000000`), invalid(list, "metadata contexts need structured replies")},
			{option(t, set, disk+`00000001`+allocation), invalid(set, "metadata contexts need structured replies")},
		}},
		{"list all", [][2]string{structured, {option(t, list, disk+`00000000`), has(list, `00000000`)}}},
		{"list a namespace", [][2]string{structured, {option(t, list, disk+`00000001 00000005 "base:"`), has(list, `00000000`)}}},
		{"list one", [][2]string{structured, {option(t, list, disk+`00000002 00000004 "x-y:"`+allocation), has(list, `00000000`)}}},
		{"list another", [][2]string{structured,
			{option(t, list, disk+`00000002 00000009 "base:else" 00000015 "qemu:allocation-depth"`), ack(list)}}},
		{"list of the default export", [][2]string{structured, {option(t, list, `00000000 00000000`), has(list, `00000000`)}}},
		{"set it", [][2]string{structured, {option(t, set, disk+`00000001`+allocation), has(set, `00000001`)}}},
		{"set it twice in one request", [][2]string{structured, {option(t, set, disk+`00000002`+allocation+allocation), has(set, `00000001`)}}},
		{"set none", [][2]string{structured, {option(t, set, disk+`00000000`), ack(set)}}},
		{"set a namespace", [][2]string{structured, {option(t, set, disk+`00000001 00000005 "base:"`), ack(set)}}},
		{"no such export", [][2]string{structured,
			{option(t, list, `00000002 "no" 00000000`), optionReply(t, list, `80000006`, `"no such export"`)},
			{option(t, set, `00000002 "no" 00000001`+allocation), optionReply(t, set, `80000006`, `"no such export"`)},
		}},
		{"a query without a namespace", [][2]string{structured, {option(t, set, disk+`00000001 00000004 "base"`), malformed(set)}}},
		{"no data", [][2]string{structured, {option(t, set, ``), malformed(set)}}},
		{"no number of queries", [][2]string{structured, {option(t, set, disk+`0000`), malformed(set)}}},
		{"a name longer than the data", [][2]string{structured, {option(t, list, `00000005 "disk"`), malformed(list)}}},
		{"a name of 4 GiB", [][2]string{structured, {option(t, list, `ffffffff "disk" 00000000`), malformed(list)}}},
		{"a name over 4096 bytes", [][2]string{structured,
			{option(t, list, `00001001 "`+strings.Repeat("x", 4097)+`" 00000000`), malformed(list)}}},
		{"more queries than it holds", [][2]string{structured, {option(t, set, disk+`00000002`+allocation), malformed(set)}}},
		{"4 G queries", [][2]string{structured, {option(t, set, disk+`ffffffff`+allocation), malformed(set)}}},
		{"a query longer than the data", [][2]string{structured, {option(t, set, disk+`00000001 00000010 "base:allocation"`), malformed(set)}}},
		{"more data than it says", [][2]string{structured, {option(t, set, disk+`00000001`+allocation+`00`), malformed(set)}}},
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
			r.send(option(t, `00000002`, ``)) // haggling goes on
			r.expect(ack(`00000002`))
			r.expectEOF()
		})
	}
}

// TestContextsBelongToTheirExport chooses base:allocation and then opens an export: BLOCK_STATUS is there
// only if it was the same one, and the last choice was good.
func TestContextsBelongToTheirExport(t *testing.T) {
	choose := func(name string) string {
		return option(t, `0000000a`, fmt.Sprintf(`%08x "%s" 00000001 0000000f "base:allocation"`, len(name), name))
	}
	for _, tt := range []struct {
		name    string
		options []string
		ok      bool
	}{
		{"chosen", []string{choose("disk")}, true},
		{"not chosen", nil, false},
		{"for another export", []string{choose("other")}, false},
		{"for another export at last", []string{choose("disk"), choose("other")}, false},
		{"given up", []string{choose("disk"), option(t, `0000000a`, `00000004 "disk" 00000000`)}, false},
		{"a later choice fails", []string{choose("disk"), choose("nope")}, false},
		{"a later choice is malformed", []string{choose("disk"), option(t, `0000000a`, `00`)}, false},
		{"looked around", []string{choose("disk"), option(t, `00000009`, `00000005 "other" 00000000`)}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newFullDevice(64 << 10)
			s := startServer(t, Options{Exports: &memExports{names: []string{"disk", "other"},
				devices: map[string]Device{"disk": d, "other": newFullDevice(4096)}}}, ListenOptions{})
			r := s.raw()
			r.expect(hexGreeting)
			r.send(`00000003` + option(t, `00000008`, ``) + strings.Join(tt.options, ``) + option(t, `00000007`, `00000004 "disk" 0000`))
			r.skipPast(hexOptReply + `00000007 00000001 00000000`)
			r.send(hexRequest + `0000 0007 00000000000000aa 0000000000000000 00010000`)
			if tt.ok {
				r.expect(hexChunk + `0001 0005 00000000000000aa 0000000c 00000001 00010000 00000003`)
			} else {
				r.expect(errChunk(`00000000000000aa`, `00000016`, "EINVAL: invalid request"))
			}
		})
	}
}

// goFull goes to transmission with base:allocation, by structured replies or extended headers.
func (r raw) goFull(extended bool) {
	r.t.Helper()
	r.expect(hexGreeting)
	style := `00000008`
	if extended {
		style = `0000000b`
	}
	r.send(`00000003` + option(r.t, style, ``) + option(r.t, `0000000a`, `00000004 "disk" 00000001 0000000f "base:allocation"`) +
		option(r.t, `00000007`, `00000004 "disk" 0000`))
	r.skipPast(hexOptReply + `00000007 00000001 00000000`)
}

// skipPast reads until it has seen the last bytes of what is expected.
func (r raw) skipPast(hex string) {
	r.t.Helper()
	want := string(unhex(r.t, hex))
	var got []byte
	for one := make([]byte, 1); !strings.HasSuffix(string(got), want); got = append(got, one[0]) {
		if _, err := r.Read(one); err != nil {
			r.t.Fatalf("after %x: %v", got, err)
		}
	}
}

// TestStatusBytes asks a disk of 64 KiB with data in its second and fourth block.
func TestStatusBytes(t *testing.T) {
	const (
		cookie = `00000000000000aa`
		status = `0007` + cookie
		einval = "EINVAL: invalid request"
	)
	d := newFullDevice(64 << 10)
	d.data[4096], d.data[3*4096+7] = 1, 1
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goFull(false)
	for _, step := range [][2]string{
		{hexRequest + `0000` + status + `0000000000000000 00010000`, hexChunk + `0001 0005` + cookie + `0000002c 00000001
			00001000 00000003  00001000 00000000  00001000 00000003  00001000 00000000  0000c000 00000003`},
		{hexRequest + `0008` + status + `0000000000000000 00010000`, // REQ_ONE
			hexChunk + `0001 0005` + cookie + `0000000c 00000001 00001000 00000003`},
		{hexRequest + `0008` + status + `0000000000001234 00000100`, // within a block
			hexChunk + `0001 0005` + cookie + `0000000c 00000001 00000100 00000000`},
		{hexRequest + `0001` + status + `0000000000000fff 00000002`, // across two, with FUA
			hexChunk + `0001 0005` + cookie + `00000014 00000001 00000001 00000003 00000001 00000000`},
		{hexRequest + `0000` + status + `0000000000000000 00000000`, errChunk(cookie, `00000016`, einval)},
		{hexRequest + `0000` + status + `0000000000000001 00010000`, errChunk(cookie, `00000016`, einval)}, // past the end
		{hexRequest + `0000` + status + `ffffffffffffffff 00000001`, errChunk(cookie, `00000016`, einval)},
		{hexRequest + `0004` + status + `0000000000000000 00010000`, errChunk(cookie, `00000016`, einval)}, // DF
		{hexRequest + `0008 0000` + cookie + `0000000000000000 00000001`, errChunk(cookie, `00000016`, einval)},
	} {
		r.send(step[0])
		r.expect(step[1])
	}
}

// TestStatusIsBounded asks about a disk that changes with every block.
func TestStatusIsBounded(t *testing.T) {
	d := newFullDevice(4 * statusMax * 4096)
	for i := 0; i < len(d.data); i += 8192 {
		d.data[i] = 1
	}
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goFull(false)
	r.send(hexRequest + fmt.Sprintf(`0000 0007 00000000000000aa 0000000000000000 %08x`, len(d.data)))
	r.expect(hexChunk + fmt.Sprintf(`0001 0005 00000000000000aa %08x 00000001`, 4+8*statusMax))
	r.expect(strings.Repeat(`00001000 00000000 00001000 00000003`, statusMax/2))
	r.send(hexRequest + `0000 0003 00000000000000ab 0000000000000000 00000000`)
	r.expect(hexSimple + `00000000 00000000000000ab`)
}

// TestCacheIsAPrefetch expects CACHE to reach the device, with simple replies too, and not to be answered
// before it has ended; and other requests to go on meanwhile.
func TestCacheIsAPrefetch(t *testing.T) {
	d := newFullDevice(64 << 10)
	held := newGate()
	type rng struct{ off, n int64 }
	asked := make(chan rng, 10)
	d.onPrefetch = func(ctx context.Context, off, n int64) error {
		asked <- rng{off, n}
		if off == 0x8000 {
			return fmt.Errorf("deep inside: %w", vdisk.ErrDamaged)
		}
		return held.pass(ctx)
	}
	d.readOnly = true // CACHE changes nothing
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	r.send(hexRequest + `0000 0005 00000000000000aa 0000000000001001 00002002`)
	if got := within(t, "the prefetch", asked); got != (rng{0x1001, 0x2002}) {
		t.Errorf("prefetch of %+v", got)
	}
	within(t, "the prefetch", held.entered)
	r.send(hexRequest + `0000 0000 00000000000000ab 0000000000000000 00000001`)
	r.expect(hexSimple + `00000000 00000000000000ab 00`)
	r.send(hexRequest + `0000 0005 00000000000000ac 0000000000008000 00000001`) // fails
	r.expect(hexSimple + `00000005 00000000000000ac`)
	r.send(hexRequest + `0000 0005 00000000000000ad 0000000000000000 00000000`) // nothing
	r.expect(hexSimple + `00000000 00000000000000ad`)
	r.send(hexRequest + `0000 0005 00000000000000ae 0000000000000001 00010000`) // past the end
	r.expect(hexSimple + `00000016 00000000000000ae`)
	r.send(hexRequest + `0008 0005 00000000000000af 0000000000000000 00000001`) // REQ_ONE
	r.expect(hexSimple + `00000016 00000000000000af`)
	close(held.open)
	r.expect(hexSimple + `00000000 00000000000000aa`)
	_ = r.Close()
}

// TestCachesAreFewAtATime sends many and expects no more than cachesMax to be under way.
func TestCachesAreFewAtATime(t *testing.T) {
	d := newFullDevice(1 << 20)
	held := newGate()
	d.onPrefetch = func(ctx context.Context, _, _ int64) error { return held.pass(ctx) }
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	for i := range 4 * cachesMax {
		r.send(hexRequest + fmt.Sprintf(`0000 0005 %016x 0000000000000000 00001000`, i))
	}
	for range cachesMax {
		within(t, "a prefetch", held.entered)
	}
	r.send(hexRequest + `0000 0000 00000000000000ab 0000000000000000 00000001`) // cached reads go on
	r.expect(hexSimple + `00000000 00000000000000ab 00`)
	if n := len(held.entered); n != 0 {
		t.Errorf("%d more entered", n)
	}
	close(held.open)
	r.simpleReplies(4 * cachesMax)
}
