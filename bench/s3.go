package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
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
	lines   map[string]*line // by bucket: what it reads through; nil = without delay
}

// A line delays what is read through it: each answer begins after latency, and all share the rate evenly.
type line struct {
	latency time.Duration
	rate    float64 // bytes per second

	mu   sync.Mutex
	next time.Time // when it is free
}

// slowWriter sends the body of an answer through a line.
type slowWriter struct {
	http.ResponseWriter
	l *line
}

func (w slowWriter) Write(p []byte) (n int, err error) {
	const piece = 16 << 10
	for n < len(p) && err == nil {
		part := p[n:min(n+piece, len(p))]
		w.l.mu.Lock()
		now := time.Now()
		if w.l.next.Before(now) {
			w.l.next = now
		}
		wait := w.l.next.Sub(now)
		w.l.next = w.l.next.Add(time.Duration(float64(len(part)) / w.l.rate * float64(time.Second)))
		w.l.mu.Unlock()
		time.Sleep(wait)
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

// serveSlowly answers a read through the bucket's line; false if that is none of its requests.
func (s *s3Server) serveSlowly(w http.ResponseWriter, r *http.Request) bool {
	bucket, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	s.mu.Lock()
	o, have := s.objects[r.URL.Path]
	l := s.lines[bucket]
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
	body, err := io.ReadAll(r.Body)
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

// listLocked names the objects of a bucket, in no order and all at once: a gateway lists only to see
// whether there is any.
func (s *s3Server) listLocked(w http.ResponseWriter, r *http.Request) {
	type content struct {
		Key  string
		Size int
	}
	var found struct {
		XMLName  xml.Name `xml:"ListBucketResult"`
		Contents []content
	}
	bucket := strings.TrimSuffix(r.URL.Path, "/") + "/"
	for path, o := range s.objects {
		if key, ok := strings.CutPrefix(path, bucket); ok {
			found.Contents = append(found.Contents, content{key, len(o.body)})
		}
	}
	w.Header().Set("Content-Type", "application/xml")
	_ = xml.NewEncoder(w).Encode(found) // a client that has gone
}

func s3Error(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<Error><Code>%s</Code></Error>", code)
}
