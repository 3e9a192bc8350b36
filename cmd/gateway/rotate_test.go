package main

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"graindisk/backend"
	"graindisk/config"
)

// TestCredentialsFileIsReadAgain rotates a signature in the file that the configuration names, under a target that
// is open: the next call finds it.
func TestCredentialsFileIsReadAgain(t *testing.T) {
	takes := "first"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Query().Get("sig") != takes {
			w.Header().Set("x-ms-error-code", "AuthenticationFailed")
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.Header().Set("ETag", `"1"`)
		w.WriteHeader(http.StatusCreated)
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "sas")
	write := func(sig string) {
		if err := os.WriteFile(file, []byte("sas=sv=2024&sig="+sig+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	var said strings.Builder
	log := slog.New(slog.NewTextHandler(&said, nil))
	target := config.Target{Name: "blob", Azure: &config.Azure{
		Account: "acct", Container: "box", Endpoint: server.URL + "/acct", CredentialsFile: file,
	}}
	s, err := openStore(t.Context(), target, false, 1, log)
	if err != nil {
		t.Fatal(err)
	}
	store := adapt(s, target, log)
	put := func() error {
		_, err := store.Put(t.Context(), "k", []byte("x"), backend.Cond{Absent: true})
		return err
	}
	if err := put(); err != nil {
		t.Fatal(err)
	}
	takes = "second"
	write("second")
	if err := put(); err != nil {
		t.Error("after the rotation:", err)
	}
	takes = "third" // and nobody has written it down
	if err := put(); !errors.Is(err, backend.ErrAuth) {
		t.Errorf("without the new signature: %v", err)
	}
	if text := said.String(); !strings.Contains(text, "new ones are in use") || strings.Contains(text, "sig=") || strings.Contains(text, "second") {
		t.Errorf("the log says %q", text)
	}
}
