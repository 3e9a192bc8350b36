package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"graindisk/writeback"
)

// TestSignsOfLife judges the lock of a gateway that is gone.
func TestSignsOfLife(t *testing.T) {
	ours, other := writeback.UUID{1}, writeback.UUID{2}
	then := moment{"boot-1", time.Hour, 1000 * time.Hour}
	after := func(boot, wall time.Duration) moment {
		return moment{then.boot, then.since + boot, then.wall + wall}
	}
	whole := signature(then, []tenure{{log: writeback.UUID{9}}, {ours, 3}}, "8:9")
	for _, c := range []struct {
		name string
		text string
		at   moment
		want bool
	}{
		{"a moment ago", whole, after(time.Second, time.Second), true},
		{"at the last moment", whole, after(aliveWithin, aliveWithin), true},
		{"with older text behind it", whole + "log 0200\ncrc 00000000\n", after(0, 0), true},
		{"long ago", whole, after(time.Minute, time.Minute), false},
		{"long ago by the wall alone", whole, after(time.Second, time.Minute), false},
		{"long ago by the boot alone", whole, after(time.Minute, time.Second), false},
		{"later than now", whole, after(-time.Second, time.Second), false},
		{"in another boot", whole, moment{"boot-2", then.since, then.wall}, false},
		{"another log", signature(then, []tenure{{other, 3}}, "8:9"), after(0, 0), false},
		{"no log", signature(then, nil, "8:9"), after(0, 0), false},
		{"a boot without a name", signature(moment{"", then.since, then.wall}, []tenure{{ours, 3}}, "8:9"), moment{"", then.since, then.wall}, false},
		{"cut short", whole[:len(whole)-1], after(0, 0), false},
		{"changed", strings.Replace(whole, "alive boot-1 3", "alive boot-1 4", 1), after(1000*time.Second, 0), false},
		{"empty", "", after(0, 0), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := dataDir{last: []byte(c.text)}
			if got := d.served(ours, c.at); got != c.want {
				t.Errorf("got %v from %q", got, c.text)
			}
		})
	}
}

// TestALockTellsWhoServed signs as a gateway does, and reads what it leaves when it is killed and when it
// is closed.
func TestALockTellsWhoServed(t *testing.T) {
	dir := t.TempDir()
	id := writeback.UUID{7}
	d, err := lockData(t.Context(), dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	if d.servedJustNow(id) {
		t.Error("served before anything was")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done, asked := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		d.signLife(ctx, func() []tenure {
			select {
			case asked <- struct{}{}:
			case <-ctx.Done():
			}
			return []tenure{{id, 5}, {writeback.UUID{9}, 0}}
		}, slog.New(slog.DiscardHandler))
	}()
	<-asked
	<-asked // so the first is written
	killed := filepath.Join(t.TempDir(), "killed")
	text, err := os.ReadFile(filepath.Join(dir, "lock"))
	if err == nil {
		err = os.MkdirAll(killed, 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(killed, "lock"), text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	k, err := lockData(t.Context(), killed, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer k.unlock()
	if k.hadTenure(5, uuid.UUID(id).String()) {
		t.Error("a copy of the lock proves that the owner is gone")
	}
	if !k.servedJustNow(id) || k.servedJustNow(writeback.UUID{8}) {
		t.Errorf("after %q: %v for the log that was served, %v for another", text, k.servedJustNow(id), k.servedJustNow(writeback.UUID{8}))
	}
	cancel()
	<-done
	d.unlock() // as if it were killed
	if d, err = lockData(t.Context(), dir, 0); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		epoch uint64
		id    writeback.UUID
		want  bool
	}{{5, id, true}, {6, id, false}, {5, writeback.UUID{8}, false}, {0, writeback.UUID{9}, false}} {
		if got := d.hadTenure(c.epoch, uuid.UUID(c.id).String()); got != c.want || d.hadTenure(c.epoch, c.id.String()) != c.want {
			t.Errorf("had epoch %d of %v: %v", c.epoch, c.id, got)
		}
	}
	d.takeBack(slog.New(slog.DiscardHandler))
	d.unlock()
	if d, err = lockData(t.Context(), dir, 0); err != nil {
		t.Fatal(err)
	}
	defer d.unlock()
	if d.servedJustNow(id) {
		t.Error("served, though it was closed")
	}
}
