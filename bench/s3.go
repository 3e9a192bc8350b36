package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// A network is how far requests to an s3Server come.
type network int

const (
	netUp    network = iota // all are answered
	netRoots                // those for anything but roots are never answered: nothing can be published
	netCut                  // none is answered
)

// s3Server is an S3 store in memory, with as much of the protocol as a gateway needs, behind a network
// that can be cut: then it takes connections and requests, and never answers. Safe for concurrent use.
type s3Server struct {
	url string
	srv *http.Server

	mu      sync.Mutex
	net     network
	changed chan struct{} // closed when net changes
	objects map[string]s3Object
	puts    int
	lines   map[string]*line // by bucket: what its objects come and go through; nil = without delay
}

// A line delays what goes through it: each answer begins after latency, and all that goes one way shares the rate evenly.
type line struct {
	latency time.Duration
	rate    float64 // bytes per second, each way

	in, out lane
}

// lane is one way of a line.
type lane struct {
	mu   sync.Mutex
	next time.Time // when it is free
}

// laneSlack is how far a lane may be behind: a machine with much to do wakes late who waits, and what passed late
// makes up for it.
const laneSlack = 50 * time.Millisecond

// wait waits until n bytes may go, at so many per second.
func (l *lane) wait(n int, rate float64) {
	l.mu.Lock()
	now := time.Now()
	if least := now.Add(-laneSlack); l.next.Before(least) {
		l.next = least
	}
	wait := l.next.Sub(now)
	l.next = l.next.Add(time.Duration(float64(n) / rate * float64(time.Second)))
	l.mu.Unlock()
	time.Sleep(wait)
}

// linePiece is how much goes through a line at a time.
const linePiece = 16 << 10

// slowWriter sends the body of an answer through a line.
type slowWriter struct {
	http.ResponseWriter
	l *line
}

// slowReader takes the body of a request through a line.
type slowReader struct {
	r io.Reader
	l *line
}

func (s slowReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p[:min(len(p), linePiece)])
	s.l.in.wait(n, s.l.rate)
	return n, err
}

func (w slowWriter) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		part := p[n:min(n+linePiece, len(p))]
		w.l.out.wait(len(part), w.l.rate)
		var m int
		m, err = w.ResponseWriter.Write(part)
		n += m
	}
	return n, err
}

// setLines puts lines before buckets.
func (s *s3Server) setLines(lines map[string]*line) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = lines
}

// empty takes all objects of a bucket, or below a prefix in it.
func (s *s3Server) empty(bucket string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.objects, func(path string, _ s3Object) bool { return strings.HasPrefix(path, "/"+bucket+"/") })
}

// lineOf is the line before the bucket that a request is for; nil if there is none.
func (s *s3Server) lineOf(r *http.Request) *line {
	bucket, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lines[bucket]
}

// putRate is how many bytes per second come through to a bucket that is put as many objects at a time as a repair does, of
// their size.
func (s *s3Server) putRate(ctx context.Context, bucket string) (float64, error) {
	const objects, each = 6, 16 << 20
	begin, body := time.Now(), make([]byte, each)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for i := range objects {
		g.Go(func() error {
			url := fmt.Sprintf("%s/%s/plain/%d", s.url, bucket, i)
			q, err := http.NewRequestWithContext(ctx, http.MethodPut, url, bytes.NewReader(body))
			if err != nil {
				return err
			}
			a, err := http.DefaultClient.Do(q)
			if err != nil {
				return err
			}
			if a.Body.Close(); a.StatusCode != http.StatusOK {
				return fmt.Errorf("put %s: %s", url, a.Status)
			}
			return nil
		})
	}
	err := g.Wait()
	rate := objects * each / time.Since(begin).Seconds()
	s.empty(bucket + "/plain")
	return rate, err
}

// serveSlowly answers a read through the bucket's line; false if that is none of its requests.
func (s *s3Server) serveSlowly(w http.ResponseWriter, r *http.Request) bool {
	l := s.lineOf(r)
	s.mu.Lock()
	o, have := s.objects[r.URL.Path]
	s.mu.Unlock()
	if l == nil || !have || r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	time.Sleep(l.latency)
	w.Header().Set("ETag", o.etag)
	http.ServeContent(slowWriter{w, l}, r, "", time.Time{}, bytes.NewReader(o.body))
	return true
}

type s3Object struct {
	body []byte
	etag string
}

// startS3 serves on a port of its own choice until close.
func startS3() (*s3Server, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &s3Server{url: "http://" + ln.Addr().String(), objects: map[string]s3Object{}, changed: make(chan struct{})}
	s.srv = &http.Server{Handler: s, ReadHeaderTimeout: time.Minute}
	go s.srv.Serve(ln)
	return s, nil
}

func (s *s3Server) close() { s.srv.Close() }

// setNetwork decides about requests that come, and those that wait for an answer.
func (s *s3Server) setNetwork(n network) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.net = n
	close(s.changed)
	s.changed = make(chan struct{})
}

// pass waits until the network lets a request through; false if the client has gone before.
func (s *s3Server) pass(r *http.Request) bool {
	for {
		s.mu.Lock()
		open, changed := s.net == netUp || s.net == netRoots && strings.HasSuffix(r.URL.Path, "/root"), s.changed
		s.mu.Unlock()
		if open {
			return true
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return false
		}
	}
}

// ServeHTTP implements http.Handler.
func (s *s3Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !s.pass(r) {
		return
	}
	if s.serveSlowly(w, r) {
		return
	}
	from := io.Reader(r.Body)
	if l := s.lineOf(r); l != nil && r.Method == http.MethodPut {
		time.Sleep(l.latency)
		from = slowReader{from, l}
	}
	body, err := io.ReadAll(from)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o, have := s.objects[r.URL.Path]
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		switch {
		case r.URL.Query().Get("list-type") != "":
			s.listLocked(w, r)
		case strings.Count(r.URL.Path, "/") == 1: // a bucket: there is any
		case !have:
			s3Error(w, http.StatusNotFound, "NoSuchKey")
		default:
			w.Header().Set("ETag", o.etag)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(o.body))
		}
	case http.MethodPut:
		if match := r.Header.Get("If-Match"); r.Header.Get("If-None-Match") != "" && have || match != "" && match != o.etag {
			s3Error(w, http.StatusPreconditionFailed, "PreconditionFailed")
			return
		}
		s.puts++
		o = s3Object{body: body, etag: fmt.Sprintf("%q", fmt.Sprintf("e%d", s.puts))}
		s.objects[r.URL.Path] = o
		w.Header().Set("ETag", o.etag)
	case http.MethodDelete:
		delete(s.objects, r.URL.Path)
		w.WriteHeader(http.StatusNoContent)
	default:
		s3Error(w, http.StatusNotImplemented, "NotImplemented")
	}
}

// listLocked names the objects of a bucket below a prefix and after a key, in order, as many as the request wants.
func (s *s3Server) listLocked(w http.ResponseWriter, r *http.Request) {
	type content struct {
		Key  string
		Size int
	}
	var found struct {
		XMLName     xml.Name `xml:"ListBucketResult"`
		IsTruncated bool
		Contents    []content
	}
	q, bucket := r.URL.Query(), strings.TrimSuffix(r.URL.Path, "/")+"/"
	for path, o := range s.objects {
		if key, ok := strings.CutPrefix(path, bucket); ok && strings.HasPrefix(key, q.Get("prefix")) && key > q.Get("start-after") {
			found.Contents = append(found.Contents, content{key, len(o.body)})
		}
	}
	slices.SortFunc(found.Contents, func(a, b content) int { return strings.Compare(a.Key, b.Key) })
	if most, err := strconv.Atoi(q.Get("max-keys")); err == nil && most < len(found.Contents) {
		found.Contents, found.IsTruncated = found.Contents[:most], true
	}
	w.Header().Set("Content-Type", "application/xml")
	_ = xml.NewEncoder(w).Encode(found) // a client that has gone
}

func s3Error(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<Error><Code>%s</Code></Error>", code)
}
