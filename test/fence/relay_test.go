package fence

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"graindisk/backend/backendtest/miniotest"
	"graindisk/test/harness"
)

// relay passes TCP connections on to a server, unless it is cut: then they end, and new ones end at once.
type relay struct {
	net.Listener
	to string

	mu    sync.Mutex
	isCut bool
	conns map[net.Conn]bool
	wg    sync.WaitGroup
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{Listener: l, to: to, conns: map[net.Conn]bool{}}
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.wg.Go(func() { r.carry(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.cut(true)
		r.wg.Wait()
	})
	return r
}

// add notes a connection that a cut ends; it reports false while there is a cut.
func (r *relay) add(c net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.isCut {
		r.conns[c] = true
	}
	return !r.isCut
}

func (r *relay) drop(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
	c.Close()
}

func (r *relay) carry(c net.Conn) {
	defer r.drop(c)
	if !r.add(c) {
		return
	}
	s, err := net.Dial("tcp", r.to)
	if err != nil {
		return
	}
	defer r.drop(s)
	if !r.add(s) {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(s, c)
		s.Close()
	}()
	io.Copy(c, s)
	c.Close()
	<-done
}

func (r *relay) cut(on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.isCut = on
	if on {
		for c := range r.conns {
			c.Close()
		}
	}
}

// TestAnOwnerThatIsCutOffGoesOn cuts a gateway off from its stores: it goes on acknowledging, also after another
// one has taken the pool over, which says so. Once it can reach the stores again it finds out, and what it acknowledged
// is listed by disk and range, at once and in quarantine.
func TestAnOwnerThatIsCutOffGoesOn(t *testing.T) {
	store := miniotest.Start(t)
	r := newRelay(t, strings.TrimPrefix(store.Endpoint, "http://"))
	var direct, relayed []string
	for range 3 {
		bucket := store.Bucket(t)
		line := func(endpoint string) string {
			return fmt.Sprintf("s3: {endpoint: %q, bucket: %s, path_style: true, access_key_id: %s, secret_access_key: %s}",
				endpoint, bucket, miniotest.AccessKey, miniotest.SecretKey)
		}
		direct, relayed = append(direct, line(store.Endpoint)), append(relayed, line("http://"+r.Addr().String()))
	}
	a, b := newHost(t, relayed, 2*time.Second), newHost(t, direct, 2*time.Second)
	a.create()
	first := a.serve()
	model := a.newDisk(first)
	published := a.until("published", func(s status) bool { return s.Unpublished == 0 }).Cut
	r.cut(true)
	load := startWriter(t, first)
	load.reach(t, 100)

	b.refused(nil, "held by", "no sign of life", "cut off from the targets", fmt.Sprintf("as of cut %d", published), "--takeover")
	second := b.serve("--takeover")
	mustSay(t, second.Log(), "taken over from", fmt.Sprintf("as of cut %d", published), "may go on acknowledging", "quarantine there")
	load.reach(t, 100)
	s := a.status()
	if s.State != "serving" || s.Fenced != nil || s.Unpublished == 0 {
		t.Errorf("an owner that is cut off: %+v", s)
	}
	holds(t, second, model)
	r.cut(false)
	s = a.until("fenced", func(s status) bool { return s.Fenced != nil })
	if err := load.ended(); err == nil {
		t.Errorf("the load goes on")
	}
	l := s.Fenced.Lost
	if l.ByLog != b.status().Owner.Log || l.ByEpoch != 2 || l.ThroughCut != published || !l.Sure {
		t.Errorf("fenced: %+v", l)
	}
	_, blocks := readLost(t, a.tier+"/main")
	load.compare(t, blocks)
	mustSay(t, harness.Must(t, harness.Binary(t), "pool", "status", "--config", a.config), "fenced by", "epoch 2", "inspect quarantine")

	if code := first.Stop(); code != 11 {
		t.Errorf("a fenced gateway ended with %d", code)
	}
	if code := second.Stop(); code != 0 {
		t.Fatalf("the second ended with %d", code)
	}
	first = a.serve("--takeover")
	q := a.status().Quarantines
	if len(q) != 1 {
		t.Fatalf("quarantines %+v", q)
	}
	_, again := readLost(t, q[0].Dir)
	load.compare(t, again)
	holds(t, first, model)
}
