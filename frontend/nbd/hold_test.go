package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"graindisk/vdisk"
)

// holdingDevice holds replies back while told to. Once fenced it fails everything, as a disk of a fenced pool does.
type holdingDevice struct {
	*fullDevice
	asked chan struct{} // takes one for each question that must wait

	mu     sync.Mutex
	closed chan struct{} // nil: replies may leave
	fenced bool
}

func newHoldingDevice() *holdingDevice {
	d := &holdingDevice{fullDevice: newFullDevice(1 << 20), asked: make(chan struct{}, 100)}
	d.onWrite = func(context.Context, []WriteOp, bool) error { return d.fence() }
	d.onFlush = func(context.Context) error { return d.fence() }
	return d
}

func (d *holdingDevice) fence() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fenced {
		return vdisk.ErrFenced
	}
	return nil
}

func (d *holdingDevice) Hold(ctx context.Context) error {
	d.mu.Lock()
	closed := d.closed
	d.mu.Unlock()
	if closed != nil {
		d.asked <- struct{}{}
		select {
		case <-closed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return d.fence()
}

func (d *holdingDevice) hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = make(chan struct{})
}

// release lets replies leave, or with fenced never.
func (d *holdingDevice) release(fenced bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fenced = fenced
	close(d.closed)
	d.closed = nil
}

// silent expects that nothing comes; it cannot fail of a slow machine.
func (r raw) silent() {
	r.t.Helper()
	_ = r.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	p := make([]byte, 64)
	if n, err := r.Read(p); !errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Fatalf("got %x, %v while replies were held back", p[:n], err)
	}
	_ = r.SetReadDeadline(time.Now().Add(testTimeout))
}

// heldRequests are requests of each kind, and their replies.
var heldRequests = []struct {
	name, send, reply string
	missing           bool // the device must ask the store
}{
	{"a write", hexRequest + `0000 0001 00000000000000aa 0000000000000000 00000002 "hi"`, hexSimple + `00000000 00000000000000aa`, false},
	{"a flush", hexRequest + `0000 0003 00000000000000aa 0000000000000000 00000000`, hexSimple + `00000000 00000000000000aa`, false},
	{"a read", hexRequest + `0000 0000 00000000000000aa 0000000000001000 00000002`, hexSimple + `00000000 00000000000000aa 0000`, false},
	{"a read from the store", hexRequest + `0000 0000 00000000000000aa 0000000000001000 00000002`, hexSimple + `00000000 00000000000000aa 0000`, true},
	{"a trim", hexRequest + `0000 0004 00000000000000aa 0000000000000000 00001000`, hexSimple + `00000000 00000000000000aa`, false},
	{"zeroes", hexRequest + `0000 0006 00000000000000aa 0000000000000000 00001000`, hexSimple + `00000000 00000000000000aa`, false},
	{"a prefetch", hexRequest + `0000 0005 00000000000000aa 0000000000000000 00001000`, hexSimple + `00000000 00000000000000aa`, false},
}

// TestNoReplyLeavesWhileItIsHeldBack asks for everything while replies are held back: nothing may come before they are
// released, and nothing at all if the disk has been lost by then. Who connects after that is told so.
func TestNoReplyLeavesWhileItIsHeldBack(t *testing.T) {
	for _, q := range heldRequests {
		for _, fenced := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, fenced %v", q.name, fenced), func(t *testing.T) {
				d := newHoldingDevice()
				d.onTry = func(int64, int) bool { return !q.missing }
				s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
				r := s.raw()
				r.goDisk(false)
				d.hold()
				r.send(q.send)
				within(t, "the question", d.asked)
				r.silent()
				d.release(fenced)
				if !fenced {
					r.expect(q.reply)
					return
				}
				r.expectEOF()
				again := s.raw()
				again.expect(hexGreeting)
				again.send(`00000003 "IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000`)
				again.expect(hexOptReply + `00000007 80000007 00000030 "another gateway owns the pool of this export now"`) // ERR_SHUTDOWN
			})
		}
	}
}

// TestAHeldConnectionEnds hangs up, and shuts the server down, while replies are held back.
func TestAHeldConnectionEnds(t *testing.T) {
	d := newHoldingDevice()
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	left, stays := s.raw(), s.raw()
	left.goDisk(false)
	stays.goDisk(false)
	d.hold()
	for _, r := range []raw{left, stays} {
		r.send(heldRequests[0].send)
		within(t, "the question", d.asked)
	}
	_ = left.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shut down with a reply held back: %v", err)
	}
	stays.expectEOF()
}

// TestDropClosesTheConnectionsToAnExport drops one export of two while a write of each is under way.
func TestDropClosesTheConnectionsToAnExport(t *testing.T) {
	writing, goOn := make(chan struct{}, 2), make(chan struct{})
	slow := func() *memDevice {
		d := newMemDevice(1 << 20)
		d.onWrite = func(context.Context, []WriteOp, bool) error {
			writing <- struct{}{}
			<-goOn
			return nil
		}
		return d
	}
	e := &memExports{names: []string{"disk", "other"}, devices: map[string]Device{"disk": slow(), "other": slow()}}
	s := startServer(t, Options{Exports: e}, ListenOptions{})
	r, o := s.raw(), s.raw()
	r.goDisk(false)
	o.expect(hexGreeting)
	o.send(`00000003 "IHAVEOPT" 00000007 0000000b 00000005 "other" 0000`)
	o.expect(hexOptReply + `00000007 00000003 0000000c 0000 0000000000100000`)
	flags := make([]byte, 2+20)
	if _, err := io.ReadFull(o, flags); err != nil {
		t.Fatal(err)
	}
	for _, c := range []raw{r, o} {
		c.send(heldRequests[0].send)
		within(t, "the write", writing)
	}
	done := make(chan error, 1)
	go func() {
		done <- s.Drop(context.Background(), func(export string) bool { return export == "disk" })
	}()
	select {
	case err := <-done:
		t.Fatalf("dropped before the write was answered: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(goOn)
	r.expect(heldRequests[0].reply)
	r.expectEOF()
	if err := within(t, "the drop", done); err != nil {
		t.Error(err)
	}
	o.expect(heldRequests[0].reply)
	o.send(heldRequests[1].send)
	o.expect(heldRequests[1].reply)
}
