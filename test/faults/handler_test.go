package faults

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// deck is what befalls each hundred requests, in random order.
var deck = map[string]int{
	"busy":  5, // 503, and nothing happened
	"lost":  2, // 500, after the effect
	"cut":   2, // half a body, and the connection ends
	"reset": 1, // connection reset before an answer
	"twice": 2, // delivered twice, and answered the second time: a put that wants a name for itself finds its own object
}

// fits tells whether a fault can befall a request of that method; if not, it waits for one.
func fits(fault, method string) bool {
	switch fault {
	case "cut":
		return method == http.MethodGet
	case "twice":
		return method == http.MethodPut
	}
	return true
}

// handler passes requests on to a store and lets some go wrong. Safe for concurrent use.
type handler struct {
	proxy *httputil.ReverseProxy

	mu     sync.Mutex
	rng    *rand.Rand
	calm   bool // no faults
	cards  []string
	owed   []string // faults that had no request which they fit
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
	u.Path = "" // an emulator's has the account in it, as has the request
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
	if len(h.cards) == 0 {
		h.cards = make([]string, 100)
		n := 0
		for _, fault := range slices.Sorted(maps.Keys(deck)) {
			for range deck[fault] {
				h.cards[n] = fault
				n++
			}
		}
		h.rng.Shuffle(len(h.cards), func(i, j int) { h.cards[i], h.cards[j] = h.cards[j], h.cards[i] })
	}
	fault := h.cards[0]
	h.cards = h.cards[1:]
	if fault != "" && !fits(fault, method) {
		h.owed, fault = append(h.owed, fault), ""
	}
	if i := slices.IndexFunc(h.owed, func(f string) bool { return fits(f, method) }); fault == "" && i >= 0 {
		fault = h.owed[i]
		h.owed = slices.Delete(h.owed, i, i+1)
	}
	if fault != "" {
		h.hit[fault]++
	}
	return fault
}

// ServeHTTP implements http.Handler.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch h.draw(r.Method) {
	case "busy":
		w.Header().Set("Content-Type", "application/xml")
		w.Header().Set("x-ms-error-code", "ServerBusy") // Azure's word for it; S3's is in the body
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
	case "twice":
		h.passTwice(w, r)
	default:
		h.pass(w, r)
	}
}

// passTwice delivers a put again once it has been answered, as a proxy does whose answer got lost. The bytes were
// sent once.
func (h *handler) passTwice(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	h.count(r, int64(len(body)))
	first := r.Clone(r.Context())
	first.Body = io.NopCloser(bytes.NewReader(body))
	h.proxy.ServeHTTP(&silent{header: http.Header{}}, first)
	r.Body = io.NopCloser(bytes.NewReader(body))
	h.proxy.ServeHTTP(w, r)
}

// pass hands a request on, counting what is put.
func (h *handler) pass(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut {
		body := &counted{ReadCloser: r.Body}
		r.Body = body
		defer func() { h.count(r, body.n.Load()) }()
	}
	h.proxy.ServeHTTP(w, r)
}

// count notes that n bytes of a put were sent. The rest may still be on its way if it was answered early.
func (h *handler) count(r *http.Request, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sent += n
	if n == r.ContentLength {
		h.stored[r.URL.Path] = max(h.stored[r.URL.Path], n)
	}
}

// volume is how many bytes were put, and how many of them are stored. Objects that change are few and small.
func (h *handler) volume() (sent, stored int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, n := range h.stored {
		stored += n
	}
	return h.sent, stored
}

func (h *handler) setCalm(calm bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calm = calm
}

func (h *handler) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	text := fmt.Sprintf("%d requests, of them", h.asked)
	for _, fault := range slices.Sorted(maps.Keys(deck)) {
		text += fmt.Sprintf(" %d %s,", h.hit[fault], fault)
	}
	return strings.TrimSuffix(text, ",")
}

// all tells whether every fault was met.
func (h *handler) all() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.hit) == len(deck)
}

// counted is a body that somebody may still read when its request has been answered.
type counted struct {
	io.ReadCloser
	n atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
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
