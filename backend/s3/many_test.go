package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"graindisk/backend"
)

func TestBatchReportsFailuresByKey(t *testing.T) {
	const body = `<?xml version="1.0"?><DeleteResult><Deleted><Key>gone</Key></Deleted>` +
		`<Error><Key>denied</Key><Code>AccessDenied</Code><Message>no</Message></Error>` +
		`<Error><Key>slow</Key><Code>SlowDown</Code><Message>later</Message></Error>` +
		`<Error><Key>broken</Key><Code>InternalError</Code><Message>oops</Message></Error>` +
		`<Error><Key>missing</Key><Code>NoSuchKey</Code><Message>none</Message></Error></DeleteResult>`
	s, requests := fakeStore(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, body) })
	keys := []string{"gone", "denied", "slow", "a//b", "broken", "missing", "unnamed", "gone"}
	want := []backend.Class{0, backend.Auth, backend.Throttled, backend.Permanent, backend.Transient, 0, backend.Transient, 0}
	errs := s.DeleteBatch(t.Context(), keys)
	if len(errs) != len(keys) {
		t.Fatalf("%d errors", len(errs))
	}
	for i, err := range errs {
		if backend.ClassOf(err) != want[i] {
			t.Errorf("%s: %v, want class %v", keys[i], err, want[i])
		}
		var e *backend.Error
		if err != nil && (!errors.As(err, &e) || e.Key != keys[i] || e.Op != "delete") {
			t.Errorf("%s: the error's place is %v", keys[i], err)
		}
	}
	if n := requests.Load(); n != 1 {
		t.Errorf("%d requests", n)
	}
}

// TestBatchThatIsNotKnownBecomesSingleDeletes also counts them: none hides in the driver.
func TestBatchThatIsNotKnownBecomesSingleDeletes(t *testing.T) {
	for _, status := range []int{http.StatusNotImplemented, http.StatusMethodNotAllowed} {
		s, requests := fakeStore(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				answer(status, "")(w, r)
				return
			}
			w.WriteHeader(http.StatusNoContent)
		})
		for range 2 {
			if errs := backend.DeleteMany(t.Context(), s, []string{"a", "b"}); errs != nil {
				t.Errorf("%d: %v", status, errs)
			}
		}
		if n := requests.Load(); n != 1+2+2 {
			t.Errorf("%d: %d requests", status, n)
		}
		store := reopen(t, s, 1)
		requests.Store(0)
		for range 2 {
			if errs := store.DeleteBatch(t.Context(), []string{"a", "b"}); errs != nil {
				t.Errorf("%d: %v", status, errs)
			}
		}
		if n, _ := counted(store); n != 1+2+2 || requests.Load() != int64(n) {
			t.Errorf("%d: %d requests, %d are counted", status, requests.Load(), n)
		}
	}
}

func TestBatchThatFailsFailsEveryKey(t *testing.T) {
	s, _ := fakeStore(t, answer(403, "AccessDenied"))
	errs := s.DeleteBatch(t.Context(), []string{"a", "b"})
	if len(errs) != 2 || backend.ClassOf(errs[0]) != backend.Auth || backend.ClassOf(errs[1]) != backend.Auth {
		t.Errorf("%v", errs)
	}
}

// recorded opens a store on a server that says yes, and returns its requests.
func recorded(t *testing.T, o Options, reply http.HandlerFunc) (*Store, func() []*http.Request) {
	t.Helper()
	var mu sync.Mutex
	var got []*http.Request
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		mu.Lock()
		got = append(got, r.Clone(context.Background()))
		mu.Unlock()
		w.Header().Set("ETag", `"e"`)
		reply(w, r)
	}))
	t.Cleanup(server.Close)
	o.Bucket, o.Endpoint, o.PathStyle, o.AccessKey, o.SecretKey = "b", server.URL, true, "a", "s"
	s, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return s, func() []*http.Request {
		mu.Lock()
		defer mu.Unlock()
		defer func() { got = nil }()
		return got
	}
}

// parts answers an upload in parts. Whatever finish is, it answers the completion.
func parts(finish http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		switch {
		case q.Has("uploads"):
			_, _ = io.WriteString(w, `<InitiateMultipartUploadResult><UploadId>id</UploadId></InitiateMultipartUploadResult>`)
		case r.Method == http.MethodPost && q.Has("uploadId"):
			finish(w, r)
		case q.Has("delete"):
			_, _ = io.WriteString(w, `<DeleteResult><Deleted><Key>k</Key></Deleted></DeleteResult>`)
		}
	}
}

func completed(w http.ResponseWriter, _ *http.Request) {
	_, _ = io.WriteString(w, `<CompleteMultipartUploadResult><ETag>"all"</ETag></CompleteMultipartUploadResult>`)
}

// TestChecksumHeaders looks at what goes with each kind of request that carries a body.
func TestChecksumHeaders(t *testing.T) {
	for sum, want := range map[Checksum]struct{ crc, md5 bool }{CRC32C: {true, false}, MD5: {false, true}, None: {false, false}} {
		s, requests := recorded(t, Options{Checksum: sum, MultipartAbove: multipartMin}, parts(completed))
		for _, size := range []int{0, 100, multipartMin + 1} {
			if _, err := s.Put(t.Context(), "k", make([]byte, size), backend.Cond{}); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range requests() {
			if r.Method != http.MethodPut {
				continue
			}
			if crc, md5 := r.Header.Get("X-Amz-Checksum-Crc32c") != "", r.Header.Get("Content-Md5") != ""; crc != want.crc || md5 != want.md5 {
				t.Errorf("%s: PUT %s has a CRC32C: %v, an MD5: %v", sum, r.URL, crc, md5)
			}
			if r.Header.Get("X-Amz-Content-Sha256") != "UNSIGNED-PAYLOAD" {
				t.Errorf("%s: PUT %s signs its body", sum, r.URL)
			}
		}
		if errs := s.DeleteBatch(t.Context(), []string{"k"}); errs != nil {
			t.Fatal(errs)
		}
		_, _, _ = s.Get(t.Context(), "k", 10)
		for _, r := range requests() {
			if any := strings.Contains(strings.ToLower(fmt.Sprint(r.Header)), "checksum"); any != (sum == CRC32C) {
				t.Errorf("%s: %s %s has %v", sum, r.Method, r.URL, r.Header)
			}
			if r.Method == http.MethodPost && (r.Header.Get("Content-Md5") != "") != (sum != CRC32C) {
				t.Errorf("%s: the batch has %v", sum, r.Header)
			}
		}
	}
}

// TestCompletionIsSentOnce expects the condition to go with the last request alone, and that one not to be sent
// again: its refusal would be the echo of its own success.
func TestCompletionIsSentOnce(t *testing.T) {
	for name, c := range map[string]struct {
		finish http.HandlerFunc
		want   backend.Class
	}{
		"done":                   {completed, 0},
		"refused":                {answer(412, "PreconditionFailed"), backend.Precondition},
		"a rival was under way":  {answer(409, "ConditionalRequestConflict"), backend.Transient},
		"a 500":                  {answer(500, "InternalError"), backend.Transient},
		"an error dressed as ok": {answer(200, "InternalError"), backend.Transient},
		"the parts are gone":     {answer(404, "NoSuchUpload"), backend.Transient},
		"a lost reply":           {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, backend.Transient},
	} {
		for _, cond := range []backend.Cond{{Absent: true}, {Match: `"x"`}, {}} {
			s, requests := recorded(t, Options{MultipartAbove: multipartMin}, parts(c.finish))
			_, err := s.Put(t.Context(), "k", make([]byte, multipartMin+1), cond)
			if backend.ClassOf(err) != c.want {
				t.Errorf("%s: %v, want class %v", name, err, c.want)
			}
			completions, aborts := 0, 0
			for _, r := range requests() {
				conditional := r.Header.Get("If-None-Match") + r.Header.Get("If-Match")
				switch {
				case r.Method == http.MethodPost && r.URL.Query().Has("uploadId"):
					completions++
					if want := map[backend.Cond]string{{Absent: true}: "*", {Match: `"x"`}: `"x"`}[cond]; conditional != want {
						t.Errorf("%s: the completion of %+v has the condition %q", name, cond, conditional)
					}
				case conditional != "":
					t.Errorf("%s: %s %s has a condition", name, r.Method, r.URL)
				case r.Method == http.MethodDelete:
					aborts++
				}
			}
			if completions != 1 || (aborts == 1) != (c.want != 0) {
				t.Errorf("%s: %d completions, %d aborts", name, completions, aborts)
			}
		}
	}
}

func TestEndedUploadIsTakenAway(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	aborted := make(chan struct{}, 10)
	s, _ := recorded(t, Options{MultipartAbove: multipartMin}, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPut:
			cancel()
			<-r.Context().Done()
		case r.Method == http.MethodDelete:
			aborted <- struct{}{}
		default:
			parts(completed)(w, r)
		}
	})
	_, err := s.Put(ctx, "k", make([]byte, multipartMin+1), backend.Cond{})
	if backend.ClassOf(err) != backend.Transient || !errors.Is(err, context.Canceled) {
		t.Errorf("put gives %v", err)
	}
	if len(aborted) != 1 {
		t.Errorf("%d aborts", len(aborted))
	}
}

func TestInspectNamesUploadsThatWereLeft(t *testing.T) {
	upload := func(age time.Duration) string {
		return "<Upload><Key>p/k</Key><UploadId>u</UploadId><Initiated>" + time.Now().Add(-age).UTC().Format(time.RFC3339) + "</Initiated></Upload>"
	}
	for name, c := range map[string]struct {
		pages []string
		want  string
	}{
		"none":  {[]string{""}, ""},
		"young": {[]string{upload(time.Minute)}, ""},
		"old":   {[]string{upload(50*24*time.Hour) + upload(time.Minute), upload(2 * time.Hour)}, "2 since " + time.Now().Add(-50*24*time.Hour).UTC().Format(time.DateOnly)},
	} {
		page := 0
		s, _ := recorded(t, Options{Prefix: "p"}, func(w http.ResponseWriter, r *http.Request) {
			switch q := r.URL.Query(); {
			case q.Has("uploads"):
				if q.Get("prefix") != "p/" || page > 0 && q.Get("key-marker") != "p/k" {
					t.Errorf("asked for %v", q)
				}
				page++
				fmt.Fprintf(w, "<ListMultipartUploadsResult><IsTruncated>%v</IsTruncated><NextKeyMarker>p/k</NextKeyMarker>"+
					"<NextUploadIdMarker>u</NextUploadIdMarker>%s</ListMultipartUploadsResult>", page < len(c.pages), c.pages[page-1])
			case q.Has("versioning"):
				_, _ = io.WriteString(w, "<VersioningConfiguration/>")
			case q.Has("object-lock"):
				answer(404, "ObjectLockConfigurationNotFoundError")(w, r)
			default:
				answer(404, "NoSuchLifecycleConfiguration")(w, r)
			}
		})
		found, err := s.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if c.want == "" && len(found) != 0 || c.want != "" && (len(found) != 1 || !found[0].Dangerous || !strings.HasPrefix(found[0].Text, c.want)) {
			t.Errorf("%s: found %+v", name, found)
		}
	}
}

func TestObjectOptionsAreChecked(t *testing.T) {
	_, err := Open(t.Context(), Options{
		Bucket: "b", Region: "r", AccessKey: "a", SecretKey: "s", Profile: "p", ExternalID: "x",
		MultipartAbove: 1 << 20, StorageClass: "DEEP_ARCHIVE", SSE: "rot13", KMSKey: "k", Checksum: "sha1",
	})
	for _, want := range []string{"multipart above 1048576", "DEEP_ARCHIVE", "rot13", "KMS key", "sha1", "several places", "external id"} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}

// TestCopyKeepsToTheSourceItSaw changes the source between the look at it and the copy: that is no refusal of the
// caller's condition.
func TestCopyKeepsToTheSourceItSaw(t *testing.T) {
	for _, cond := range []backend.Cond{{}, {Absent: true}} {
		s, requests := recorded(t, Options{}, func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Method == http.MethodHead:
				w.Header().Set("Content-Length", "100")
			case r.Method == http.MethodPut:
				answer(412, "PreconditionFailed")(w, r)
			default:
				parts(completed)(w, r)
			}
		})
		_, err := s.CopyFrom(t.Context(), "k", s, "from", cond)
		if backend.ClassOf(err) != backend.Transient || !strings.Contains(fmt.Sprint(err), "source changed") {
			t.Errorf("%+v: %v", cond, err)
		}
		copies := 0
		for _, r := range requests() {
			if source := r.Header.Get("X-Amz-Copy-Source"); source != "" {
				copies++
				if source != "b/from" || r.Header.Get("X-Amz-Copy-Source-If-Match") != `"e"` {
					t.Errorf("%+v: the copy has %v", cond, r.Header)
				}
			}
		}
		if copies != 1 {
			t.Errorf("%+v: %d copies", cond, copies)
		}
	}
}

func TestCopyFromAnotherServiceIsUnsupported(t *testing.T) {
	here, _ := fakeStore(t, answer(404, "NoSuchKey"))
	there, requests := fakeStore(t, answer(404, "NoSuchKey"))
	if _, err := here.CopyFrom(t.Context(), "k", there, "from", backend.Cond{}); !errors.Is(err, errors.ErrUnsupported) || backend.ClassOf(err) != backend.Permanent {
		t.Errorf("copy gives %v", err)
	}
	if n := requests.Load(); n != 0 {
		t.Errorf("%d requests", n)
	}
}
