// A failed check names its text and place and ends the program with status 1.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <source_location>

inline void check_at(bool condition, const char* text, std::source_location where = std::source_location::current()) {
  if (condition) return;
  std::fprintf(stderr, "%s:%u: failed: %s\n", where.file_name(), static_cast<unsigned>(where.line()), text);
  std::exit(1);
}
#define CHECK(...) check_at(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__)

template <typename Error, typename Function>
void check_throws(Function function, const char* part, std::source_location where = std::source_location::current()) {
  try {
    function();
  } catch (const Error& error) {
    check_at(std::string(error.what()).find(part) != std::string::npos, error.what(), where);
    return;
  }
  check_at(false, "nothing was thrown", where);
}
