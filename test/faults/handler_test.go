package faults

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"sync"
	"testing"
)

// The share of requests that each fault befalls.
const (
	busyShare  = 0.05 // 503, and nothing happened
	lostShare  = 0.02 // 500, after the effect
	cutShare   = 0.02 // half a body
	resetShare = 0.01 // connection reset before an answer
)

// handler passes requests on to a store and lets some go wrong. Safe for concurrent use.
type handler struct {
	proxy *httputil.ReverseProxy

	mu     sync.Mutex
	rng    *rand.Rand
	calm   bool // no faults
	hit    map[string]int
	asked  int
	sent   int64            // bytes of bodies put, again and again
	stored map[string]int64 // by key: length of the object put
}

func newHandler(t *testing.T, store string, seed uint64) *handler {
	t.Helper()
	u, err := url.Parse(store)
	if err != nil {
		t.Fatal(err)
	}
	return &handler{
		proxy: &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			r.Out.Host = r.In.Host // it is signed
		}},
		rng: rand.New(rand.NewPCG(seed, 0)), hit: map[string]int{}, stored: map[string]int64{}, calm: true,
	}
}

// draw chooses a fault for a request.
func (h *handler) draw(method string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked++
	if h.calm {
		return ""
	}
	x := h.rng.Float64()
	for _, f := range []struct {
		name  string
		share float64
		fits  bool
	}{{"busy", busyShare, true}, {"lost", lostShare, true}, {"cut", cutShare, method == http.MethodGet}, {"reset", resetShare, true}} {
		if x -= f.share; x < 0 {
			if !f.fits {
				return ""
			}
			h.hit[f.name]++
			return f.name
		}
	}
	return ""
}

// ServeHTTP implements http.Handler.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch h.draw(r.Method) {
	case "busy":
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, `<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>reduce your request rate</Message></Error>`)
	case "lost":
		h.pass(&silent{header: http.Header{}}, r)
		w.WriteHeader(http.StatusInternalServerError)
	case "cut":
		h.pass(&cutter{ResponseWriter: w}, r)
		panic(http.ErrAbortHandler)
	case "reset":
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			_ = conn.(*net.TCPConn).SetLinger(0)
			_ = conn.Close()
		}
	default:
		h.pass(w, r)
	}
}

// pass hands a request on, counting what is put.
func (h *handler) pass(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut {
		body := &counted{ReadCloser: r.Body}
		r.Body = body
		defer func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.sent += body.n
			h.stored[r.URL.Path] = max(h.stored[r.URL.Path], r.ContentLength)
		}()
	}
	h.proxy.ServeHTTP(w, r)
}

// amplification is how many bytes were put for each byte stored. Objects that change are few and small.
func (h *handler) amplification() float64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	var sum int64
	for _, n := range h.stored {
		sum += n
	}
	return float64(h.sent) / float64(max(sum, 1))
}

func (h *handler) setCalm(calm bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calm = calm
}

func (h *handler) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return fmt.Sprintf("%d requests, of them %d busy, %d lost, %d cut short, %d reset", h.asked, h.hit["busy"], h.hit["lost"], h.hit["cut"], h.hit["reset"])
}

func (h *handler) all() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return min(h.hit["busy"], h.hit["lost"], h.hit["cut"], h.hit["reset"])
}

type counted struct {
	io.ReadCloser
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n += int64(n)
	return n, err
}

// silent swallows an answer.
type silent struct{ header http.Header }

func (s *silent) Header() http.Header         { return s.header }
func (s *silent) Write(p []byte) (int, error) { return len(p), nil }
func (s *silent) WriteHeader(int)             {}

// cutter passes half of a body on.
type cutter struct {
	http.ResponseWriter
	left int64
}

func (c *cutter) WriteHeader(code int) {
	n, _ := strconv.ParseInt(c.Header().Get("Content-Length"), 10, 64)
	c.left = n / 2
	c.ResponseWriter.WriteHeader(code)
}

func (c *cutter) Write(p []byte) (int, error) {
	n := min(int64(len(p)), c.left)
	c.left -= n
	_, err := c.ResponseWriter.Write(p[:n])
	return len(p), err
}
